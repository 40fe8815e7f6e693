"""C++ snippets of chained decode functions: sharing among threads, and one helper per kind of stage."""

from __future__ import annotations

TEAM = """// The part of the work that a thread does: slots [begin, end) of `of`.
struct Share {
  int64_t begin, end, of;
  bool first() const { return begin == 0; }
  int64_t low(int64_t n) const { return cut(n, begin); }
  int64_t high(int64_t n) const { return cut(n, end); }

 private:
  int64_t cut(int64_t n, int64_t slot) const {  // in whole groups of 8
    const int64_t at = (n + 7) / 8 * slot / of * 8;
    return at < n ? at : n;
  }
};

// All threads of one call meet here; a thread stands for as many slots as it was given.
class Barrier {
 public:
  void wait(const Share& share) {
    const int64_t now = turn_.load(std::memory_order_acquire), weight = share.end - share.begin;
    if (arrived_.fetch_add(weight, std::memory_order_acq_rel) + weight == share.of) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == now; ++spins) {
      if (spins < kSpins) {
        _mm_pause();
      } else {
        sched_yield();  // more threads than cores: let the others arrive
      }
    }
  }

 private:
  static constexpr int kSpins = 4096;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> turn_{0};
};

// Memory that a thread keeps from call to call; `which` tells apart what it lends out at the same time.
inline float* scratch(int which, int64_t floats) {
  thread_local std::vector<float> memory[2];
  if (static_cast<int64_t>(memory[which].size()) < floats + 16) memory[which].resize(floats + 16);
  auto at = reinterpret_cast<uintptr_t>(memory[which].data());
  return reinterpret_cast<float*>((at + 63) / 64 * 64);
}"""

VECTORS = """inline Vec load(const float* p, int64_t n) { return n == kLanes ? vload(p) : vload_first(p, n); }

template <class F>
inline void each(int64_t low, int64_t high, float* out, const F& f) {
  int64_t i = low;
  for (; i + kLanes <= high; i += kLanes) vstore(out + i, f(i, kLanes));
  if (i < high) vstore_first(out + i, f(i, high - i), high - i);
}"""

LINEAR = """// Rows [low, high) of a weight [rows, K] times x.
inline void linear(const float* w, const float* bias, const float* x, int64_t K, int64_t low, int64_t high,
                   float* y) {
  const int64_t quarter = (high - low) / 4;
  auto put = [&](int64_t row, float value) { y[row] = bias == nullptr ? value : value + bias[row]; };
  for (int64_t i = low; i < low + quarter; ++i) {
    const float* rows[4];
    for (int s = 0; s < 4; ++s) rows[s] = w + (i + s * quarter) * K;
    float out[1][4];
    dot_rows<1, 4>(rows, x, K, K, out);
    for (int s = 0; s < 4; ++s) put(i + s * quarter, out[0][s]);
  }
  for (int64_t i = low + 4 * quarter; i < high; ++i) {
    const float* row = w + i * K;
    float out[1][1];
    dot_rows<1, 1>(&row, x, K, K, out);
    put(i, out[0][0]);
  }
}"""

RMS_NORM = """inline void rms_norm(const float* x, const float* weight, float eps, float offset, int64_t rows,
                     int64_t D, float* y) {
  for (int64_t r = 0; r < rows; ++r, x += D, y += D) {
    Vec sums[2] = {vset(0.0f), vset(0.0f)};
    int64_t i = 0;
    for (; i + 2 * kLanes <= D; i += 2 * kLanes)
      for (int u = 0; u < 2; ++u) {
        Vec a = vload(x + i + u * kLanes);
        sums[u] = vfma(a, a, sums[u]);
      }
    for (; i < D; i += kLanes) {
      Vec a = load(x + i, D - i < kLanes ? D - i : kLanes);
      sums[0] = vfma(a, a, sums[0]);
    }
    const Vec rstd = vset(1.0f / __builtin_sqrtf(vsum(vadd(sums[0], sums[1])) / static_cast<float>(D) + eps));
    each(0, D, y, [&](int64_t k, int64_t n) {
      Vec a = vmul(load(x + k, n), rstd);
      return weight == nullptr ? a : vmul(a, vadd(load(weight + k, n), vset(offset)));
    });
  }
}"""

LAYER_NORM = """inline void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                       int64_t rows, int64_t D, float* y) {
  for (int64_t r = 0; r < rows; ++r, x += D, y += D) {
    float sum = 0.0f, squares = 0.0f;
    for (int64_t i = 0; i < D; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(D);
    for (int64_t i = 0; i < D; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const Vec rstd = vset(1.0f / __builtin_sqrtf(squares / static_cast<float>(D) + eps));
    each(0, D, y, [&](int64_t k, int64_t n) {
      Vec a = vmul(vadd(load(x + k, n), vset(-mean)), rstd);
      if (weight != nullptr) a = vmul(a, load(weight + k, n));
      return bias == nullptr ? a : vadd(a, load(bias + k, n));
    });
  }
}"""

ROPE = """// Rotates pairs (i, i + D/2) of each head.
inline void rope(const float* x, const float* cos, const float* sin, int64_t heads, int64_t D, float* y) {
  const int64_t half = D / 2;
  for (int64_t h = 0; h < heads; ++h, x += D, y += D) {
    each(0, half, y, [&](int64_t i, int64_t n) {
      Vec turned = vmul(load(x + half + i, n), load(sin + i, n));
      return vadd(vmul(load(x + i, n), load(cos + i, n)), vmul(turned, vset(-1.0f)));
    });
    each(0, half, y + half, [&](int64_t i, int64_t n) {
      Vec turned = vmul(load(x + i, n), load(sin + half + i, n));
      return vfma(load(x + half + i, n), load(cos + half + i, n), turned);
    });
  }
}"""

KV_UPDATE = """inline void kv_update(const float* row, int64_t at, int64_t heads, int64_t length, int64_t D,
                      float* cache) {
  const size_t bytes = D * sizeof(float);
  for (int64_t h = 0; h < heads; ++h) std::memcpy(cache + (h * length + at) * D, row + h * D, bytes);
}"""

ATTENTION = """// Keys [low, high) of one head for G queries: output [G][E] before it is normalised,
// largest score and sum of each.
template <int G, int D, int E, class Mask>
inline void attend(const float* q, const float* k, const float* v, const Mask& mask, int64_t low,
                   int64_t high, float scale, float* scores, float* out, float* most, float* mass) {
  const float none = -std::numeric_limits<float>::infinity();
  const int64_t n = high - low, room = (n + kLanes - 1) / kLanes * kLanes;
  for (int g = 0; g < G; ++g) most[g] = none;
  auto put = [&](int g, int64_t t, float score) {
    score = mask(t, score * scale);
    scores[g * room + t - low] = score;
    most[g] = score > most[g] ? score : most[g];
  };
  int64_t t = low;
  for (; t + 4 <= high; t += 4) {
    const float* keys[4] = {k + t * D, k + (t + 1) * D, k + (t + 2) * D, k + (t + 3) * D};
    float s[G][4];
    dot_rows<G, 4>(keys, q, D, D, s);
    for (int g = 0; g < G; ++g)
      for (int j = 0; j < 4; ++j) put(g, t + j, s[g][j]);
  }
  for (; t < high; ++t) {
    const float* key = k + t * D;
    float s[G][1];
    dot_rows<G, 1>(&key, q, D, D, s);
    for (int g = 0; g < G; ++g) put(g, t, s[g][0]);
  }
  for (int g = 0; g < G; ++g) {
    float* p = scores + g * room;
    for (int64_t i = n; i < room; ++i) p[i] = none;
    Vec sum = vset(0.0f);
    const Vec top = vset(-most[g]);
    for (int64_t i = 0; i < room && most[g] > none; i += kLanes) {
      Vec e = vexp(vadd(vload(p + i), top));
      vstore(p + i, e);
      sum = vadd(sum, e);
    }
    mass[g] = vsum(sum);
    if (!(most[g] > none)) std::memset(p, 0, room * sizeof(float));
  }
  constexpr int kParts = (E + kLanes - 1) / kLanes, kWide = kParts < 4 ? kParts : 4;
  for (int64_t e = 0; e < E; e += kWide * kLanes) {
    Vec sum[G][kWide];
    for (int g = 0; g < G; ++g)
      for (int u = 0; u < kWide; ++u) sum[g][u] = vset(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      const float* row = v + (low + i) * E + e;
#pragma GCC unroll 4
      for (int u = 0; u < kWide; ++u) {
        const int64_t left = E - e - u * kLanes;
        if (left <= 0) break;
        Vec b = load(row + u * kLanes, left < kLanes ? left : kLanes);
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) sum[g][u] = vfma(vset(scores[g * room + i]), b, sum[g][u]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int u = 0; u < kWide; ++u) {
        const int64_t left = E - e - u * kLanes;
        if (left >= kLanes) vstore(out + g * E + e + u * kLanes, sum[g][u]);
        else if (left > 0) vstore_first(out + g * E + e + u * kLanes, sum[g][u], left);
      }
  }
}

// A share without keys.
inline void empty(float* found, int64_t heads, int64_t E) {
  for (int64_t h = 0; h < heads; ++h) {
    found[heads * E + h] = -std::numeric_limits<float>::infinity();
    found[heads * (E + 1) + h] = 0.0f;
  }
}

// What the shares found for each of `heads` queries, put together.
inline void merge(const float* found, int64_t shares, int64_t heads, int64_t E, float* out) {
  const int64_t each_share = heads * (E + 2);
  for (int64_t h = 0; h < heads; ++h) {
    float most = -std::numeric_limits<float>::infinity(), mass = 0.0f;
    auto at = [&](int64_t s) { return found + s * each_share + heads * E + h; };
    for (int64_t s = 0; s < shares; ++s) most = at(s)[0] > most ? at(s)[0] : most;
    each(0, E, out + h * E, [](int64_t, int64_t) { return vset(0.0f); });
    for (int64_t s = 0; s < shares; ++s)
      if (at(s)[heads] > 0.0f) mass += at(s)[heads] * expf(at(s)[0] - most);
    for (int64_t s = 0; s < shares; ++s) {
      if (!(at(s)[heads] > 0.0f)) continue;
      const Vec factor = vset(expf(at(s)[0] - most) / mass);
      const float* part = found + s * each_share + h * E;
      each(0, E, out + h * E, [&](int64_t i, int64_t n) {
        return vfma(load(part + i, n), factor, load(out + h * E + i, n));
      });
    }
  }
}"""
