"How an affine map passes through each operation: the registries, and a module of rules for each family of operations."
from .core import *
from . import shapes,windows,arithmetic,products,norms
