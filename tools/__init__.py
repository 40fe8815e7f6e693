"""Developer tools: model zoo, size budget, offline compilation, benchmarks."""
