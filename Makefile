# Each target sets up what it needs: a virtual environment in .venv, made once and again when requirements.txt changes.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
READY := $(VENV)/.ready
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Without a GPU, torch's build for CPUs: the default one brings gigabytes of CUDA. Where its index cannot be reached, the
# next line of the recipe takes what pip's own index has.
CPU_TORCH = --no-deps --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' requirements.txt)

.PHONY: train train-metaworld test test-fast numbers test-faults test-cluster test-oldest lint pretrain evaluate clean

train: $(READY)  ## fine-tune the shipped checkpoint with PPO: the main job
	$(VENV)/bin/python experiments/ppo_vla.py $(ARGS)

train-metaworld: $(READY)  ## fine-tune the shipped clone on three tasks of Meta-World: more than an hour
	$(VENV)/bin/python experiments/ppo_vla.py --config experiments/configs/metaworld.json $(ARGS)

pretrain: $(READY)  ## imitate as for the shipped checkpoint, into runs/imitation/
	$(VENV)/bin/python experiments/bc_vla.py $(ARGS)

evaluate: $(READY)  ## evaluate the shipped checkpoint
	$(VENV)/bin/python experiments/evaluate_vla.py $(ARGS)

test: $(READY)  ## all tests, in two processes of one thread each
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-fast: $(READY)  ## mathematics, contracts and parsing: no training run, nothing compiled
	$(VENV)/bin/python -m pytest -m "not slow" $(ARGS)

numbers: $(READY)  ## what README, RESULTS and docs/ say, computed again from the committed rows
	$(VENV)/bin/python -m pytest -m numbers $(ARGS)

test-faults: $(READY)  ## kills, full disks, broken files, many times over: docs/reliability.md
	$(VENV)/bin/python -m pytest -m "faults or properties" --hypothesis-profile=faults -s $(ARGS)

test-cluster: $(READY)  ## workers on a Ray cluster of two nodes, one of which is killed
	$(PIP) -e .[ray]
	$(VENV)/bin/python -m pytest -m cluster -s $(ARGS)

test-oldest:  ## the fast tests with the oldest versions that pyproject.toml allows
	PYTHON=$(PYTHON) .ci/oldest $(ARGS)

lint: $(READY)  ## what CI checks besides the tests
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed; set PYTHON=python3.11" && false)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(PIP) $(CPU_TORCH) 2>/dev/null || true
	$(PIP) -r requirements.txt
	@touch $(READY)

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) .venv-oldest build *.egg-info .pytest_cache .ruff_cache
