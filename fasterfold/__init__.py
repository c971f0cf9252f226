"""Fold the normalization layers of a trained model into the layers around them, and prove that nothing changed.

`from fasterfold import BN_Folder` is for any PyTorch model, `from fasterfold.all import *` for fastai: it gives learners `fold`, too.
Nothing is imported before it is asked for."""
from typing import TYPE_CHECKING

# Modules with the public names they have; a name must not be that of a module, which would take its place once imported
_homes = dict(state='FoldError', sample='infer_sample', find='Kept', plan='Folded FoldPlan', fold='BN_Folder', load='fold_like',
    cost='count_parameters model_size latency compare', bench='FoldBench', certify='Certificate', report='FoldReport', learner='FoldCallback FoldedValidation', export='Exported')
_home = {n:m for m,names in _homes.items() for n in names.split()}
__all__ = [n for n,m in _home.items() if m not in ('learner','export')] # the others import fastai

if TYPE_CHECKING:
    from .all import *
    __version__ = ''
else:
    def __getattr__(name):
        from importlib import import_module
        if name=='__version__': return import_module('importlib.metadata').version(__name__)
        if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        res = getattr(import_module(f'{__name__}.{_home[name]}'), name)
        import_module(f'{__name__}.help').explain(__name__)
        return res

def __dir__(): return sorted({*globals(), *_home, '__version__'})
