"""`from qisal.all import *`: everything public, next to fastai's names, and nothing else happens."""
import importlib, json, subprocess, sys
import qisal.all as A

def python(code): return json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, encoding='utf-8').stdout.splitlines()[-1])

def test_every_public_name_is_there():
    for m in A.MODULES:
        mod = importlib.import_module(f'qisal.{m}')
        for o in mod.__all__:
            if o not in A.OURS_BY_MODULE: assert getattr(A, o) is getattr(mod, o) and o in A.__all__
    for o, m in A.OURS_BY_MODULE.items(): assert o not in A.__all__ and hasattr(importlib.import_module(f'qisal.{m}'), o)

def test_both_orders_give_the_same_names():
    code = """import json
def star(*modules):
    ns = {}
    for o in modules: exec(f'from {o} import *', ns)
    ns.pop('__builtins__')
    return ns
ours, theirs = star('qisal.all'), star('fastai.vision.all')
both = star('fastai.vision.all', 'qisal.all'), star('qisal.all', 'fastai.vision.all')
print(json.dumps([sorted(set(ours) & set(theirs)), *[[o for d in (ours, theirs) for o in d if ns[o] is not d[o]] for ns in both]]))"""
    assert python(code) == [[], [], []]

def test_no_side_effects():
    code = '''import json, os, random
import fastai.vision.all, numpy as np, torch, matplotlib as mpl, warnings
def state(): return [repr(random.getstate()), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype() is torch.float32,
    {k: str(v) for k, v in mpl.rcParams.items()}, dict(os.environ), sorted(os.listdir('.')), len(warnings.filters), [o.__name__ for o in fastai.vision.all.Learner.__mro__], sorted(vars(fastai.vision.all.Learner))]
before = state()
import qisal.all
print(json.dumps([i for i, (a, b) in enumerate(zip(before, state())) if a != b]))'''
    assert python(code) == []

def test_heavy_imports_wait():
    assert python("import json, sys, qisal.all; print(json.dumps([o for o in ('captum', 'seaborn', 'papermill', 'onnx', 'onnxruntime', 'jinja2', 'typer', 'nbconvert') if o in sys.modules]))") == []

def test_package_itself_is_light():
    assert python("import json, sys, qisal; print(json.dumps([o for o in ('torch', 'numpy', 'pandas', 'fastai', 'matplotlib') if o in sys.modules]))") == []

def test_modules_are_reached_through_the_package():
    "After both star imports `save_model` is fastai's; ours needs no further import. So does every module after `import qisal` alone."
    code = """import json
from fastai.vision.all import *
from qisal.all import *
from qisal.all import OURS_BY_MODULE
import qisal.all
print(json.dumps([save_model.__module__, qisal.deploy.save_model.__module__, [eval(f'qisal.{m}.{o}').__module__ for o, m in OURS_BY_MODULE.items()]]))"""
    theirs, ours, homes = python(code)
    assert theirs == 'fastai.learner' and ours == 'qisal.deploy' and homes == [f'qisal.{m}' for m in A.OURS_BY_MODULE.values()]
    modules = [*A.MODULES, 'bench', 'cli']
    code = f"import json, qisal; print(json.dumps([eval(f'qisal.{{o}}').__name__ for o in {modules}] + [hasattr(qisal, 'nothing'), hasattr(qisal, '__wrapped__')]))"
    assert python(code) == [f'qisal.{o}' for o in modules] + [False, False]
