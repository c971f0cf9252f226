"What users call. Beside fastai's own `all` it shadows nothing: the engine's inner names stay in their modules."
from .state import FoldError
from .sample import infer_sample
from .find import Kept
from .plan import Folded, FoldPlan
from .fold import BN_Folder
from .load import fold_like
from .cost import count_parameters, model_size, latency, compare
from .bench import FoldBench
from .certify import Certificate
from .report import FoldReport
from .learner import FoldCallback, FoldedValidation
from .export import Exported
from .help import explain

__all__ = ['FoldError', 'infer_sample', 'Folded', 'Kept', 'FoldPlan', 'BN_Folder', 'fold_like', 'count_parameters', 'model_size', 'latency',
    'compare', 'FoldBench', 'Certificate', 'FoldReport', 'FoldCallback', 'FoldedValidation', 'Exported']

explain('fasterfold')
