"The tools that fold batch normalization, ours among them, each behind the same small function."
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Callable
import warnings

import torch
from torch import nn

from common import registry

__all__ = ['peers', 'any_shape', 'Peer', 'load_peers']

@dataclass
class Peer:
    "A folding tool: what to call, and which release of it is called"
    name:str      # What the tables call it
    version:str   # Release of the package it comes from
    fold:Callable # `fold(model, sample)` with `model` in eval and `sample` a tuple of arguments: the folded model, and the (norm, reason, calls) it kept where the tool says so

peers = {} # name -> (distribution it comes from, function that imports it and returns its `fold`)
peer = registry(peers)

@peer('fasterai', 'fasterai')
def _fasterai():
    from fasterai.misc.bn_folding import BN_Folder
    return lambda model, sample: (BN_Folder().fold(model), [])

@peer('torch.fx', 'torch')
def _fx():
    from torch.fx.experimental.optimization import fuse
    return lambda model, sample: (fuse(model), [])

@peer('aimet', 'aimet-torch')
def _aimet():
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    def _fold(model, sample):
        # Works in place. Its shapes only serve to make up an input, and it has been given one.
        fold_all_batch_norms(model, None, dummy_input=sample)
        return model,[]
    return _fold

@peer('torchao', 'torchao')
def _torchao():
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_
    def _fold(model, sample):
        model = torch.export.export(model, sample).module()
        for fuse in _fuse_conv_bn_,_fuse_linear_bn_: fuse(model)
        return model,[]
    return _fold

@peer('mct', 'model-compression-toolkit')
def _mct():
    from model_compression_toolkit import get_target_platform_capabilities
    from model_compression_toolkit.core import QuantizationConfig
    from model_compression_toolkit.core.common.model_builder_mode import ModelBuilderMode
    from model_compression_toolkit.core.graph_prep_runner import graph_preparation_runner
    from model_compression_toolkit.core.pytorch.default_framework_info import DEFAULT_PYTORCH_INFO as info
    from model_compression_toolkit.core.pytorch.pytorch_implementation import PytorchImplementation
    from model_compression_toolkit.target_platform_capabilities.targetplatform2framework.attach2pytorch import AttachTpcToPytorch
    class _Impl(PytorchImplementation):
        def to_tensor(self, x): return x # its own makes all samples float32, indices and float64 among them
    # It would also merge convolutions, in float32 whatever the model is in: 1e-6 off in float64
    impl,config = _Impl(),QuantizationConfig(linear_collapsing=False, residual_collapsing=False)
    target = AttachTpcToPytorch().attach(get_target_platform_capabilities())
    def _fold(model, sample):
        graph = graph_preparation_runner(model, lambda: iter([sample]), config, info, impl, target)
        return impl.model_builder(graph, mode=ModelBuilderMode.FLOAT, append2output=None, fw_info=info)[0],[]
    return _fold

@peer('fasterfold', 'fasterfold')
def _fasterfold():
    BN_Folder = import_module('fasterfold.fold').BN_Folder
    def _fold(model, sample):
        folder = BN_Folder()
        return folder.fold(model, sample), [(o.norm,o.reason,o.calls) for o in folder.result.kept]
    return _fold

any_shape = [o for o in peers if o not in ('torchao','mct')] # What these two fold takes inputs of one shape

class _Small(nn.Module):
    "One foldable norm of each common kind, to get a tool's first-use imports out of the way"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.fc = nn.Conv2d(3, 4, 3),nn.BatchNorm2d(4),nn.Linear(4, 2)
    def forward(self, x): return self.fc(self.bn(self.conv(x)).mean((2,3)))

def load_peers(
    names:list, # Keys of `peers`
) -> dict: # name -> `Peer`
    "Import the tools called `names` and warm each up, so that later timings hold no imports"
    res = {}
    for name in names:
        if name not in peers: raise SystemExit(f"No tool is called {name!r}: choose among {', '.join(peers)}")
        dist,importer = peers[name]
        try: fold = importer()
        except ImportError as e:
            raise SystemExit(f"{name} cannot be imported ({e}): install the tools to compare with, pip install -e '.[bench]'") from e
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')
            fold(_Small().eval(), (torch.randn(2, 3, 8, 8),))
        res[name] = Peer(name, version(dist), fold)
    return res
