"What a notebook imports: training, finished runs, configs and data; each comes with its first use"

from importlib import import_module

_ROOMS = {"fit": "training.fit", "load_run": "training.results", "load": "base.loading", "read": "data.reading"}
__all__ = list(_ROOMS)


def __getattr__(name):
    if name not in _ROOMS:
        raise AttributeError(f"module 'gpuml.train' has no attribute {name!r}; it has {', '.join(_ROOMS)}")
    return getattr(import_module(f"gpuml.{_ROOMS[name]}"), name)


def __dir__():
    return __all__
