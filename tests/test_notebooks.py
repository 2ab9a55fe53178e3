"The notebooks are the source: they are sound, clean, carry their outputs, name no machine, and the library is what they export."
import ast, json, re, subprocess, sys
from pathlib import Path

import nbformat
import pytest

from checkout import ROOT, copy_to, tracked

NBS = sorted(o for o in (ROOT/'nbs').glob('*.ipynb') if not o.name.startswith(('.', '_')))
MAX_LINES = 80  # of an export cell: one idea
# Places on somebody's machine, and addresses of package indexes.
MACHINE = re.compile(r'(?<![\w.:/~-])/(?:home|root|Users|tmp|work|mnt|private|opt|var/folders)/[\w.-]+|[A-Z]:\\Users|site-packages/|dist-packages/')
INDEX_HOST = re.compile(r'https?://[^\s"\')]*(?:/simple\b|/pypi/|\bregistry\.|pythonhosted)|https?://(?:localhost|127\.|10\.|192\.168\.)')

def read(path): return nbformat.read(path, as_version=4)
def code_cells(nb): return [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == 'code']
def marks(cell): return {o.split(':')[0].strip() for o in re.findall(r'^#\s*\|\s*(.+)$', cell.source, re.M)}
def is_export(cell): return any(o.split()[0] in {'export', 'exporti', 'exports'} for o in marks(cell))

def run_code(cell):
    "Does this cell hold code that a kernel runs?"
    dead = any(re.match(r'^#\s*\|\s*eval:\s*false', o) for o in cell.source.splitlines())
    return not dead and any(o.strip() and not o.strip().startswith('#') for o in cell.source.splitlines())

def strings(obj):
    "Every text in a piece of JSON; base64 pictures are left out."
    if isinstance(obj, str): yield obj
    elif isinstance(obj, dict):
        for k, v in obj.items():
            if not k.startswith(('image/', 'application/pdf')) or k == 'image/svg+xml': yield from strings(v)
    elif isinstance(obj, list):
        for o in obj: yield from strings(o)

def findings(text):
    "What in a text belongs to one machine."
    return [m[0] for rx in (MACHINE, INDEX_HOST) for m in rx.finditer(text)] + ([str(ROOT)] if str(ROOT) in text else [])

def test_the_search_for_machines_can_find():
    for bad in ('at /home/me/x.py', "'/tmp/a1'", 'File "' + '/root' + '/x"', 'https://mirror.example/simple/torch', 'lib/python3/site-packages/a.py', 'http://10.0.0.1/x'):
        assert findings(bad), bad
    for good in ('https://github.com/home/x', 'reports/tmp/a', 'https://arxiv.org/abs/1805.06085', '~/.cache/qisal', 'and/or' + '/root' + '/x'): assert not findings(good), good

pytestmark = pytest.mark.skipif(not NBS, reason='no notebooks')
each = pytest.mark.parametrize('path', NBS, ids=lambda o: o.stem)

@each
def test_sound(path):
    "Valid JSON of the notebook format, cells with unique ids, no conflict marks, Python that parses."
    nb = read(path)
    nbformat.validate(nb)
    ids = [c.id for c in nb.cells]
    assert len(set(ids)) == len(ids)
    for i, c in code_cells(nb):
        lines = [o for o in c.source.splitlines() if not re.match(r'^\s*[!%]', o)]
        if not c.source.startswith('%%'): ast.parse('\n'.join(lines) or 'pass', f'{path.name} cell {i}')
    assert not re.search(r'^(<{7}|>{7}) ', path.read_text(encoding='utf-8'), re.M)

@each
def test_begins_with_title_and_sentence(path):
    first = next(c for c in read(path).cells if c.cell_type == 'markdown').source
    assert re.match(r'# \S', first), 'a page begins with `# Title`'

@each
def test_has_its_outputs(path):
    "Executed as a whole: every cell with code has a number or an output somewhere after it, and none failed."
    nb = read(path)
    for i, c in code_cells(nb):
        for o in c.outputs: assert o.output_type != 'error', f'cell {i}: {o.ename}: {o.evalue}'
    showing = [(i, c) for i, c in code_cells(nb) if run_code(c) and 'export' not in marks(c) and 'hide' not in marks(c)
        and re.search(r'^(?:print|display)\(', c.source, re.M)]
    bare = [i for i, c in showing if not c.outputs]
    assert not bare, f'cells {bare} print, but hold no output: run the notebook'
    if len(code_cells(nb)) > 3: assert any(c.outputs for _, c in code_cells(nb)), 'no cell has an output'

@each
def test_names_no_machine(path):
    nb = read(path)
    for i, c in enumerate(nb.cells):
        for text in (c.source, *strings(c.get('outputs', []))): assert not findings(text), f'cell {i}: {findings(text)[:3]}'

@each
def test_export_cells_hold_one_idea(path):
    for i, c in code_cells(read(path)):
        if is_export(c): assert len(c.source.splitlines()) <= MAX_LINES, f'cell {i} has {len(c.source.splitlines())} lines'

def mixes(cell):
    "Does a cell that is not exported hold an import, also an inner one, beside anything else?"
    if is_export(cell) or not run_code(cell) or cell.source.startswith('%%'): return False
    tree = ast.parse('\n'.join('pass' if re.match(r'^\s*[!%]', o) else o for o in cell.source.splitlines()))
    kinds = (ast.Import, ast.ImportFrom)
    text = lambda o: isinstance(o, ast.Expr) and isinstance(o.value, ast.Constant)
    return any(isinstance(o, kinds) for o in ast.walk(tree)) and not all(isinstance(o, kinds) or text(o) for o in tree.body)

def test_the_search_for_mixed_cells_can_find():
    cell = lambda source: nbformat.v4.new_code_cell(source)
    for bad in ('import a\na.b()', 'def f():\n    import a', 'x = 1\nfrom a import b'): assert mixes(cell(bad)), bad
    for good in ('import a\nfrom b import c', '#| hide\nimport a', 'x = 1', '#| export\nimport a\nx = 1', '#| eval: false\nimport a\nx = 1', '"why"\nimport a'): assert not mixes(cell(good)), good

@each
def test_imports_stand_alone(path):
    "nbdev_docs executes the exported cells of a module's notebook and every other cell that imports, and nothing else: one that also computes lacks its names."
    nb = read(path)
    if not any(is_export(c) for _, c in code_cells(nb)): pytest.skip('no exported cell: nbdev_docs executes nothing')
    found = [f'cell {i} ({c.id})' for i, c in code_cells(nb) if mixes(c)]
    assert not found, f'{found}: move the imports to a cell of their own'

@each
def test_pictures_are_small(path):
    "A notebook is read in a browser: at most 4 MB."
    assert path.stat().st_size <= 4 * 2**20

def test_template_has_one_literal_parameters_cell():
    "papermill replaces the values of one cell: every line `name = literal`."
    path = ROOT/'nbs'/'90_experiment.ipynb'
    if not path.exists(): pytest.skip('no template yet')
    tagged = [c for c in read(path).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1
    for node in ast.parse(tagged[0].source).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name), ast.unparse(node)
        ast.literal_eval(node.value)

def test_every_module_comes_from_a_notebook():
    "No file of the library is written by hand."
    made = {m[1].replace('.', '/') + '.py' for p in NBS for m in re.finditer(r'#\s*\|\s*default_exp\s+([\w.]+)', p.read_text(encoding='utf-8'))}
    have = {o.relative_to(ROOT/'qisal').as_posix() for o in (ROOT/'qisal').rglob('*.py') if 'assets' not in o.parts}
    assert have - made <= {'__init__.py', 'callback/__init__.py', '_modidx.py'}
    assert made <= have

@pytest.fixture(scope='module')
def copy(tmp_path_factory): return copy_to(tmp_path_factory.mktemp('a copy')/'qisal')

def contents(folder, *globs):
    return {o.relative_to(folder).as_posix(): o.read_bytes() for g in globs for o in sorted(folder.glob(g)) if '__pycache__' not in o.parts}

def differing(before, after): return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))

def nbdev(tool, cwd):
    r = subprocess.run([str(Path(sys.executable).with_name(tool))], cwd=cwd, capture_output=True, text=True, encoding='utf-8')
    assert r.returncode == 0, r.stdout + r.stderr

def test_export_changes_nothing(copy):
    "`nbdev_export` in a copy makes the very library that is here."
    before = contents(copy, 'qisal/**/*.py', 'pyproject.toml')
    nbdev('nbdev_export', copy)
    assert not differing(before, contents(copy, 'qisal/**/*.py', 'pyproject.toml')), 'run nbdev_export'

def test_clean_changes_nothing(copy):
    "`nbdev_clean` in a copy leaves every notebook as it is here."
    before = contents(copy, 'nbs/**/*.ipynb')
    nbdev('nbdev_clean', copy)
    assert not differing(before, contents(copy, 'nbs/**/*.ipynb')), 'run nbdev_clean'

def test_import_is_light():
    "`import qisal` takes no heavy library with it."
    code = "import sys, qisal; print([o for o in ('torch', 'fastai', 'matplotlib', 'pandas', 'numpy', 'captum') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, encoding='utf-8').stdout.strip() == '[]'

def imported(tree):
    "Modules of the library that a module imports at its top or anywhere in it."
    out = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and n.module and n.module.startswith('qisal.'): out.add(n.module[6:])
        if isinstance(n, ast.Import): out |= {a.name[6:] for a in n.names if a.name.startswith('qisal.')}
    return out

def test_modules_need_only_what_stands_above():
    "The numbers of the notebooks are the order: no module imports one further down. The command line, which starts all others, comes last."
    order = [m[1] for p in NBS for m in re.finditer(r'#\s*\|\s*default_exp\s+([\w.]+)', p.read_text(encoding='utf-8'))]
    order.sort(key='cli'.__eq__)
    for i, name in enumerate(order):
        path = ROOT/'qisal'/(name.replace('.', '/') + '.py')
        below = imported(ast.parse(path.read_text(encoding='utf-8'))) & set(order[i:])
        assert not below, f'{name} imports {sorted(below)}'

def text_files():
    "What people read or run, as git tracks it; the tests themselves hold examples of what is forbidden."
    files = tracked() or []
    return [o for o in files if o.suffix in {'.py', '.md', '.ini', '.toml', '.txt', '.yaml', '.json', '.csv', '.html', ''} and o.relative_to(ROOT).parts[0] != 'tests']

def test_committed_text_names_no_machine():
    for o in text_files():
        if o.suffix == '.html': continue  # long lines of base64; the report's own test reads it
        text = o.read_text(encoding='utf-8', errors='replace')
        if o.name == 'Makefile': text = text.replace('/path/to/', '')
        assert not findings(text), f'{o.relative_to(ROOT)}: {findings(text)[:3]}'
