"""Which values share a basis: each legal construct is accepted, each illegal one is named."""

from __future__ import annotations

import pytest
import torch

from tilewright.compiler import ops
from tilewright.compiler.basis import Basis, Blocked, find_streams, find_value_heads
from tilewright.compiler.passes_base import Example, Tensor
from tilewright.compiler.selftest import capture_example

D, H, W = 16, 8, 4
TOKENS = Tensor(2, 5, dtype=torch.int64)


def weight(*shape: int) -> Tensor:
    return Tensor(*shape, gain=0.5, weight=True)


TABLE, UP, DOWN, HEAD = weight(6, D), weight(H, D), weight(D, H), weight(7, D)
GAIN, BIAS = weight(D), weight(D)


def norm(x, gain=None):
    return ops.rms_norm(x, gain, 1e-6)


def mlp(x, up, down, bias=None, gain=None):
    return ops.linear(ops.linear(norm(x, gain), up).relu(), down, bias)


def streams(model, *inputs):
    program = capture_example(Example(model, inputs))
    return program, [found for _, found in find_streams(program)]


def only(model, *inputs) -> Basis:
    _, found = streams(model, *inputs)
    assert len(found) == 1
    assert isinstance(found[0], Basis), getattr(found[0], "reason", "")
    return found[0]


def blocked(model, *inputs) -> Blocked:
    _, found = streams(model, *inputs)
    assert found
    assert isinstance(found[0], Blocked)
    return found[0]


def two_layers(
    table, tokens, up, down, end=lambda x: norm(x), middle=lambda x: x, start=lambda x: x, bias=None
):
    x = start(ops.embedding(table, tokens))
    x = x + mlp(x, up, down, bias)
    x = middle(x)
    return end(x + mlp(x, up, down, bias))


def test_readers_and_writers_of_a_decoder():
    basis = only(lambda e, t, u, d, h: ops.linear(two_layers(e, t, u, d), h), TABLE, TOKENS, UP, DOWN, HEAD)
    assert basis.width == D
    assert (len(basis.tables), len(basis.writers), len(basis.readers)) == (1, 2, 3)
    assert not basis.entries
    assert not basis.exits
    assert not basis.centred


def test_writers_with_bias():
    basis = only(
        lambda e, t, u, d, b, h: ops.linear(two_layers(e, t, u, d, bias=b), h),
        TABLE,
        TOKENS,
        UP,
        DOWN,
        BIAS,
        HEAD,
    )
    assert len(basis.writers) == 2


def test_casts_views_scales_and_token_moves_keep_the_basis():
    def move(x):
        x = (x * 4.0).reshape(10, D).reshape(2, 5, D).transpose(0, 1).transpose(0, 1)
        x = torch.cat((x[:, :2], x[:, 2:]), 1) / 2.0
        first, rest = x.split([1, 4], 1)
        x = torch.cat((first, rest), 1)
        return x * torch.arange(1.0, 6.0)[:, None] - (-x)

    basis = only(
        lambda e, t, u, d, h: ops.linear(two_layers(e, t, u, d, middle=move).mean(1), h),
        TABLE, TOKENS, UP, DOWN, HEAD,
    )  # fmt: skip
    assert len(basis.readers) == 3


def test_tied_table_and_head_without_gain_take_the_same_edit():
    basis = only(lambda e, t, u, d: ops.linear(two_layers(e, t, u, d), e), TABLE, TOKENS, UP, DOWN)
    assert (len(basis.tables), len(basis.entries), len(basis.exits)) == (1, 0, 0)


def test_tied_table_and_head_behind_a_gain_are_left_at_run_time():
    basis = only(
        lambda e, t, u, d, g: ops.linear(two_layers(e, t, u, d, end=lambda x: norm(x, g)), e),
        TABLE, TOKENS, UP, DOWN, GAIN,
    )  # fmt: skip
    assert (len(basis.tables), len(basis.entries), len(basis.exits)) == (0, 1, 1)
    assert basis.exits[0][1].target is ops.rms_norm


def test_returned_hidden_states_leave_at_run_time():
    basis = only(lambda e, t, u, d: two_layers(e, t, u, d), TABLE, TOKENS, UP, DOWN)
    assert [user.op for _, user in basis.exits] == ["output"]


def test_learned_positions_are_rotated_too():
    positions = weight(5, D)
    basis = only(
        lambda e, t, p, u, d, h: ops.linear(two_layers(e, t, u, d, start=lambda x: x + p), h),
        TABLE, TOKENS, positions, UP, DOWN, HEAD,
    )  # fmt: skip
    assert [n.op for n in basis.entries] == ["placeholder"]
    looked_up = only(
        lambda e, t, p, u, d, h: ops.linear(
            two_layers(e, t, u, d, start=lambda x: x + ops.embedding(p, torch.arange(5))), h
        ),
        TABLE, TOKENS, positions, UP, DOWN, HEAD,
    )  # fmt: skip
    assert len(looked_up.tables) == 2


def layer_norm(x, gain=None):
    return ops.layer_norm(x, [D], gain)


def centred_model(e, t, u, d, h, read=lambda x: layer_norm(x)):
    x = ops.embedding(e, t)
    x = x + ops.linear(ops.linear(layer_norm(x), u).relu(), d)
    x = x + ops.linear(ops.linear(layer_norm(x), u).relu(), d)
    return ops.linear(read(x), h)


def test_layer_norms_are_centred():
    basis = only(centred_model, TABLE, TOKENS, UP, DOWN, HEAD)
    assert len(basis.centred) == 3


@pytest.mark.parametrize(
    ("read", "name"),
    [(lambda x: x, "linear"), (norm, "rms_norm"), (lambda x: x * 2.0, "linear")],
)
def test_a_reader_of_the_mean_blocks_centring(read, name):
    found = blocked(lambda *a: centred_model(*a, read=read), TABLE, TOKENS, UP, DOWN, HEAD)
    assert "reads the mean" in found.reason
    assert found.node.name.startswith(name)


ILLEGAL = {
    "gain in the stream": (lambda x, g: x + norm(x, g) * 0.5, "gain of rms_norm", "rms_norm"),
    "post norm": (lambda x, g: norm(x, g), "goes on in the original basis", "rms_norm"),
    "channel scale": (lambda x, g: x * g, "reads single channels", "mul"),
    "channel shift": (lambda x, g: x + 1.0, "reads single channels", "add"),
    "nonlinearity": (lambda x, g: x + x.tanh(), "reads single channels", "tanh"),
    "channel slice": (lambda x, g: torch.cat((x[..., :8], x[..., 8:]), -1), "reads single channels", "slice"),
    "channel mean": (lambda x, g: x - x.mean(-1, keepdim=True), "reads single channels", "mean"),
    "channel transpose": (
        lambda x, g: x + x.transpose(1, 2).sin().transpose(1, 2),
        "reads single",
        "permute",
    ),
    "modulation": (lambda x, g: x * (1 + x.mean(1, keepdim=True)), "reads single channels", "mul"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_breaks_the_invariance_is_named(name):
    middle, reason, node = ILLEGAL[name]
    found = blocked(
        lambda e, t, u, d, g, h: ops.linear(two_layers(e, t, u, d, middle=lambda x: middle(x, g)), h),
        TABLE, TOKENS, UP, DOWN, GAIN, HEAD,
    )  # fmt: skip
    assert reason in found.reason, found.reason
    assert found.node.name.startswith(node)


def test_a_gain_that_could_be_folded_blocks():
    def model(e, t, u, d, g, h):
        return ops.linear(two_layers(e, t, u, d, end=lambda x: norm(x, g)), h)

    found = blocked(model, TABLE, TOKENS, UP, DOWN, GAIN, HEAD)
    assert "put fold-norm-scale before" in found.reason


def test_a_gain_that_cannot_be_folded_reads_the_original_basis():
    basis = only(
        lambda e, t, u, d, g: two_layers(e, t, u, d, end=lambda x: norm(x, g).sigmoid()),
        TABLE,
        TOKENS,
        UP,
        DOWN,
        GAIN,
    )
    assert [user.target for _, user in basis.exits] == [ops.rms_norm]


def test_more_online_than_read_is_not_worth_it():
    def model(e, t, u, d):
        x = ops.embedding(e, t)
        y = x + mlp(x, u, d)
        return x, y, norm(y), x * 2, y + mlp(y, u, d)

    found = blocked(model, TABLE, TOKENS, UP, DOWN)
    assert "at run time" in found.reason


def test_sandwich_norm_blocks():
    def model(e, t, u, d, g, h):
        x = ops.embedding(e, t)
        for _ in range(2):
            x = x + norm(mlp(x, u, d), g)
        return ops.linear(norm(x), h)

    found = blocked(model, TABLE, TOKENS, UP, DOWN, GAIN, HEAD)
    assert "gain of rms_norm" in found.reason


@pytest.mark.parametrize("part", ["writer", "bias", "reader"])
def test_computed_weights_block(part):
    def model(e, t, u, d, b, h, s):
        scale = {p: (s if p == part else 1.0) for p in ("writer", "bias", "reader")}
        x = ops.embedding(e, t)
        for _ in range(2):
            x = x + mlp(x, u * scale["reader"], d * scale["writer"], b * scale["bias"])
        return ops.linear(norm(x), h)

    found = blocked(model, TABLE, TOKENS, UP, DOWN, BIAS, HEAD, Tensor(1))
    assert "computed" in found.reason


def test_values_that_come_from_outside_block():
    def model(x, u, d, h):
        x = x + mlp(x, u, d)
        return ops.linear(norm(x + mlp(x, u, d)), h)

    found = blocked(model, Tensor(2, 5, D), UP, DOWN, HEAD)
    assert "original basis" in found.reason


def test_no_stream_no_basis():
    assert streams(lambda x, u: ops.linear(x, u), Tensor(2, D), UP)[1] == []


# Value heads: 2 key heads of 4 channels, 4 query heads.
V, OUT = weight(2 * W, D), weight(D, 4 * W)


def heads_of(x, count):
    return x.reshape(2, 5, count, W).permute(0, 2, 1, 3)


def attend(x, q, v, o, edit=lambda v: v, after=lambda a: a, bias=None, merged=lambda a: a):
    values = edit(heads_of(ops.linear(x, v, bias), 2))
    keys = heads_of(ops.linear(x, v), 2)
    out = ops.attention(heads_of(ops.linear(x, q), 4), repeat(keys), repeat(values))
    return ops.linear(merged(after(out).permute(0, 2, 1, 3).reshape(2, 5, 4 * W)), o)


def repeat(x):
    return x[:, :, None].expand(2, 2, 2, 5, W).reshape(2, 4, 5, W)


QUERY = weight(4 * W, D)


def values(model, *inputs, caches=False):
    program = capture_example(Example(model, inputs))
    return [found for _, found in find_value_heads(program, caches=caches)]


def test_grouped_value_heads():
    (basis,) = values(attend, Tensor(2, 5, D), QUERY, V, OUT)
    assert isinstance(basis, Basis)
    assert basis.width == W
    assert len(basis.writers) == len(basis.readers) == 1
    (biased,) = values(
        lambda x, q, v, o, b: attend(x, q, v, o, bias=b), Tensor(2, 5, D), QUERY, V, OUT, weight(8)
    )
    assert isinstance(biased, Basis)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"edit": lambda v: v.relu()}, "no projection cut into heads"),
        ({"edit": lambda v: v * torch.arange(4.0)}, "no projection cut into heads"),
        ({"after": lambda a: a.sigmoid()}, "reads single channels"),
        ({"after": lambda a: ops.rms_norm(a, torch.ones(4), 1e-6)}, "not folded"),
        ({"merged": lambda a: a * a}, "reads the merged heads"),
    ],
)
def test_value_heads_that_are_touched(options, reason):
    (found,) = values(lambda *a: attend(*a, **options), Tensor(2, 5, D), QUERY, V, OUT)
    assert isinstance(found, Blocked)
    assert reason in found.reason


def test_a_projection_that_is_also_read_otherwise_blocks():
    def model(x, q, v, o):
        values = ops.linear(x, v)
        out = ops.attention(heads_of(ops.linear(x, q), 4), repeat(heads_of(ops.linear(x, v), 2)),
                            repeat(heads_of(values, 2)))  # fmt: skip
        return ops.linear(out.permute(0, 2, 1, 3).reshape(2, 5, 16), o), values.sum()

    (found,) = values(model, Tensor(2, 5, D), QUERY, V, OUT)
    assert isinstance(found, Blocked)
    assert "too" in found.reason


def with_cache(x, q, v, o, past, share=False):
    kept = torch.cat((past, heads_of(ops.linear(x, v), 2)), 2)
    keys = torch.cat((past * 2, heads_of(ops.linear(x, v), 2)), 2)
    wide, wide_keys = (z[:, :, None].expand(2, 2, 2, 8, W).reshape(2, 4, 8, W) for z in (kept, keys))
    out = ops.attention(heads_of(ops.linear(x, q), 4), wide if share else wide_keys, wide)
    return ops.linear(out.permute(0, 2, 1, 3).reshape(2, 5, 16), o), kept


@pytest.mark.parametrize("overlap", [False, True])
def test_fused_projections(overlap):
    def model(x, qkv, o):
        fused = ops.linear(x, qkv)
        parts = (fused[..., :16], fused[..., 16:24], fused[..., (20 if overlap else 24) : 32])
        q, k, v = (heads_of(p, p.shape[-1] // W) for p in (parts[0], parts[1], parts[2][..., -8:]))
        out = ops.attention(q, repeat(k), repeat(v))
        return ops.linear(out.permute(0, 2, 1, 3).reshape(2, 5, 16), o), parts[2].sum() if overlap else 0

    (found,) = values(model, Tensor(2, 5, D), weight(32, D), OUT)
    assert isinstance(found, Blocked) is overlap
    if isinstance(found, Basis):
        assert list(found.spans.values()) == [(24, 32)]


def test_cached_values_need_leave():
    given = (Tensor(2, 5, D), QUERY, V, OUT, Tensor(2, 2, 3, W))
    (found,) = values(with_cache, *given)
    assert isinstance(found, Blocked)
    assert "other programs" in found.reason


def test_values_that_are_keys_too_are_not_rotated():
    given = (Tensor(2, 5, D), QUERY, V, OUT, Tensor(2, 2, 3, W))
    (found,) = values(lambda *a: with_cache(*a, share=True), *given, caches=True)
    assert isinstance(found, Blocked)
    assert "keys or queries too" in found.reason


def test_cached_values_are_rotated_where_all_programs_agree():
    def model(x, q, v, k, o, past, past_keys):
        kept = torch.cat((past, heads_of(ops.linear(x, v), 2)), 2)
        keys = torch.cat((past_keys, heads_of(ops.linear(x, k), 2)), 2)
        wide, wide_keys = (z[:, :, None].expand(2, 2, 2, 8, W).reshape(2, 4, 8, W) for z in (kept, keys))
        out = ops.attention(heads_of(ops.linear(x, q), 4), wide_keys, wide)
        return ops.linear(out.permute(0, 2, 1, 3).reshape(2, 5, 16), o), kept, keys

    past = Tensor(2, 2, 3, W)
    given = (Tensor(2, 5, D), QUERY, V, weight(2 * W, D), OUT, past, past)
    (basis,) = values(model, *given, caches=True)
    assert isinstance(basis, Basis)
    assert [n.name for n in basis.caches] == ["arg5_1"]
