"""Write what type checkers read: `.pyi` files of the package, in which methods added by `@patch` stand in their classes.

Type checkers do not run `@patch`, and would know nothing of `BN_Folder.undo` or `FoldReport.save`. `setup.py` writes the stubs into
the wheel, so the repository has none to keep up to date. Methods of fastai's `Learner` are not among them: fastai has no types."""
import ast
from pathlib import Path

kept = 'property','classmethod','staticmethod','contextmanager','block','dataclass'
_any = ast.Name('Any')

def _name(o): return getattr(o, 'id', getattr(o, 'attr', ''))
def _decorator(o): return _name(o.func) if isinstance(o, ast.Call) else _name(o)
def _patch(f): return next((o for o in f.decorator_list if _decorator(o)=='patch'), None)

def _typed(arg, default=None):
    "`arg` with a type: its own, which `None` belongs to if it is the default, or any."
    if arg.annotation is None: arg.annotation = _any
    elif isinstance(default, ast.Constant) and default.value is None: arg.annotation = ast.BinOp(arg.annotation, ast.BitOr(), ast.Constant(None))
    return arg

def function(
    f:ast.FunctionDef, # As written
    method:bool=False, # Is its first argument the object itself?
)->ast.FunctionDef: # Signature and docstring
    "The stub of a function."
    a = f.args
    pos = a.posonlyargs+a.args
    if method and pos: pos[0].annotation = None
    for o,d in zip(pos[method:][::-1], a.defaults[::-1]+[None]*len(pos)): _typed(o, d)
    for o,d in zip(a.kwonlyargs, a.kw_defaults): _typed(o, d)
    for o in filter(None, (a.vararg,a.kwarg)): _typed(o)
    a.defaults,a.kw_defaults = [ast.Constant(...) for _ in a.defaults],[d and ast.Constant(...) for d in a.kw_defaults]
    if f.returns is None:
        gives = any(isinstance(o, (ast.Return,ast.Yield)) and o.value is not None for o in ast.walk(f))
        f.returns = _any if gives else ast.Constant(None)
    as_prop = _patch(f) and any(k.arg=='as_prop' for k in getattr(_patch(f), 'keywords', []))
    f.decorator_list = [ast.Name('property')] if as_prop else [o for o in f.decorator_list if _decorator(o) in kept]
    if any(_decorator(o) in ('contextmanager','block') for o in f.decorator_list): f.decorator_list,f.returns = [],ast.Subscript(ast.Name('AbstractContextManager'), _any)
    doc = ast.get_docstring(f, clean=False)
    f.body = [ast.Expr(ast.Constant(doc if doc else ...))]
    return f

def _assigned(tree, prefix=''):
    "Names, or attributes of `prefix`, that `tree` assigns to."
    ok = lambda o: isinstance(o, ast.Attribute) and _name(o.value)==prefix if prefix else isinstance(o, ast.Name)
    targets = [t for o in tree for t in (o.targets if isinstance(o, ast.Assign) else [])]
    return list(dict.fromkeys(_name(o) for t in targets for o in (t.elts if isinstance(t, ast.Tuple) else [t]) if ok(o)))

def class_(c:ast.ClassDef, patched:list)->ast.ClassDef:
    "The stub of a class, with the methods in `patched`."
    doc,methods = ast.get_docstring(c, clean=False),[o for o in c.body if isinstance(o, ast.FunctionDef)]+patched
    fields = [o for o in c.body if isinstance(o, ast.AnnAssign)]
    known = {o.target.id for o in fields}|{m.name for m in methods}
    attrs = [ast.AnnAssign(ast.Name(n), _any, None, 1) for n in dict.fromkeys(_assigned(c.body)+
        [n for m in methods for n in _assigned(ast.walk(m), 'self')]) if n not in known and not n.startswith('__')]
    init = next((m for m in methods if m.name=='__init__' and any(_name(getattr(o, 'func', None))=='store_attr' for o in ast.walk(m))), None)
    if init: attrs += [ast.AnnAssign(ast.Name(o.arg), _typed(o).annotation, None, 1) for o in init.args.args[1:]]
    for o in fields:
        if o.value is None: continue
        _typed(o, o.value)
        o.value = ast.Constant(...)
    static = lambda m: any(_decorator(o)=='staticmethod' for o in m.decorator_list)
    c.decorator_list = [o for o in c.decorator_list if _decorator(o) in kept]
    c.body = ([ast.Expr(ast.Constant(doc))] if doc else [])+fields+attrs+[function(m, not static(m)) for m in methods] or [ast.Expr(ast.Constant(...))]
    return c

def stub(
    source:str, # Of a module
)->str: # Its stub
    "What type checkers need to know of a module."
    tree = ast.parse(source)
    patched = {}
    for f in tree.body:
        if isinstance(f, ast.FunctionDef) and _patch(f): patched.setdefault(_name(f.args.args[0].annotation), []).append(f)
    alone = [o for o in tree.body if isinstance(o, ast.FunctionDef) and not _patch(o)]
    res = ast.parse('from contextlib import AbstractContextManager\nfrom typing import Any').body
    for o in tree.body:
        if isinstance(o, (ast.Import,ast.ImportFrom)): res.append(o)
        elif isinstance(o, ast.ClassDef): res.append(class_(o, patched.get(o.name, [])))
        elif o in alone: res.append(function(o))
        elif isinstance(o, ast.If) and _name(o.test)=='TYPE_CHECKING': res += o.body
        elif isinstance(o, ast.Assign):
            if _assigned([o])==['__all__']: res += [o] if isinstance(o.value, ast.List) else []
            else: res += [ast.AnnAssign(ast.Name(n), _any, None, 1) for n in _assigned([o])]
    return ast.unparse(ast.fix_missing_locations(ast.Module(res, [])))+'\n'

def write(
    package:Path, # Folder of modules
    to:Path, # Folder for their stubs
):
    "Write a stub for each module of `package`."
    for p in package.rglob('*.py'):
        out = to/p.relative_to(package).with_suffix('.pyi')
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(stub(p.read_text(encoding='utf-8')), encoding='utf-8')
