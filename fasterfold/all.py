"What users call. Beside fastai's own `all` it shadows nothing: the engine's inner names stay in their modules."
from .trace import FoldError, infer_sample
from .plan import Folded, Kept, FoldPlan
from .fold import BN_Folder
from .report import count_parameters, model_size, latency, compare, FoldReport
from .learner import FoldCallback, FoldedValidation

__all__ = ['FoldError', 'infer_sample', 'Folded', 'Kept', 'FoldPlan', 'BN_Folder', 'count_parameters', 'model_size', 'latency',
    'compare', 'FoldReport', 'FoldCallback', 'FoldedValidation']
