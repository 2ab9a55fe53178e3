"""README.md from nbs/index.ipynb, with nbconvert. `python tests/readme.py` writes it, `--check` only compares.

Cells marked `#| hide` are left out, `#| echo: false` hides the code, `#| output: false` the output; all lines of directives go.
Links are rewritten from the notebook's folder to the top of the checkout. Figures are linked, never embedded: a cell whose
output is a picture is an error here (save it below reports/ and link it), as is one that failed.
"""
import json, os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT/'nbs'/'index.ipynb', ROOT/'README.md'
NOTE = '<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n'
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([^\n:]+?)\s*(?::\s*(.*?))?\s*$')

def directives(source):
    "({name: value} of the `#|` lines that begin a cell or stand in it, the source without them)."
    found, rest = {}, []
    for line in source.splitlines():
        m = DIRECTIVE.match(line)
        if m: found[m[1].strip()] = (m[2] or '').strip()
        else: rest.append(line)
    return found, '\n'.join(rest).strip('\n')

def relink(target):
    "A link of the notebook as a link of README.md."
    if re.match(r'[a-z][a-z0-9+.-]*:|#|/', target, re.I): return target
    path, mark, anchor = target.partition('#')
    return os.path.normpath(os.path.join('nbs', path)) + mark + anchor

def relink_text(text):
    "Markdown or HTML with its relative links rewritten, outside of code."
    def outside(part):
        part = re.sub(r'(\]\()([^)\s]+)', lambda m: m[1] + relink(m[2]), part)
        part = re.sub(r'^(\s{0,3}\[[^\]^]+\]:\s*)(\S+)', lambda m: m[1] + relink(m[2]), part, flags=re.M)
        return re.sub(r'''\b((?:src|href|srcset)=)(["'])([^"']+)\2''', lambda m: m[1] + m[2] + relink(m[3]) + m[2], part)
    parts = re.split(r'(^(?:```.*?^```|~~~.*?^~~~)|`[^`\n]+`)', text, flags=re.S | re.M)
    return ''.join(o if i % 2 else outside(o) for i, o in enumerate(parts))

def keep_outputs(outputs, where):
    "The outputs that a README can show: text, Markdown, HTML tables without their style."
    out = []
    for o in outputs:
        if o['output_type'] == 'error': raise SystemExit(f"{where}: the cell failed ({o['ename']}); run the notebook again")
        data = o.get('data', {})
        if any(k.startswith('image/') for k in data) and 'text/html' not in data and 'text/markdown' not in data:
            raise SystemExit(f'{where}: its output is a picture; save it below reports/ and link it, or mark the cell `#| hide`')
        if o.get('name') == 'stderr': continue
        if 'text/html' in data:
            html = ''.join(data['text/html'])
            data = {'text/html': re.sub(r'<style.*?</style>|<script.*?</script>', '', html, flags=re.S).strip()}
            o = {**o, 'data': data}
        out.append(o)
    return out

def prepare(nb):
    "The notebook as the README shows it: without hidden cells and directives, links rewritten."
    cells = []
    for i, c in enumerate(nb.cells):
        marks, c.source = directives(c.source) if c.cell_type == 'code' else ({}, relink_text(c.source))
        if 'hide' in marks or marks.get('include') == 'false' or c.cell_type == 'raw': continue
        if c.cell_type == 'code':
            c.outputs = [] if marks.get('output') == 'false' else [type(c)(o) for o in keep_outputs(c.outputs, f'index.ipynb, cell {i}')]
            if marks.get('echo') == 'false': c.source = ''
            if not c.source and not c.outputs: continue
        cells.append(c)
    nb.cells = cells
    return nb

def render(path=INDEX):
    "README.md's text from the notebook at `path`."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = prepare(nbformat.read(path, as_version=4))
    nb.metadata.language_info = {'name': 'python'}
    order = ['text/markdown', 'text/html', 'text/plain']
    text, res = MarkdownExporter(config=Config({'NbConvertBase': {'display_data_priority': order}})).from_notebook_node(nb)
    if res.get('outputs'): raise SystemExit(f"index.ipynb embeds {', '.join(res['outputs'])}; save figures below reports/ and link them")
    text = re.sub(r'^```python\n+```\n', '', text, flags=re.M)  # the code of `#| echo: false`
    text = '\n'.join(o.rstrip() for o in text.splitlines())
    return NOTE + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

def main(args):
    if not INDEX.exists(): raise SystemExit('nbs/index.ipynb is missing: README.md is made from it')
    text = render()
    if '--check' in args:
        if not README.exists() or README.read_text(encoding='utf-8') != text: raise SystemExit('README.md is not what nbs/index.ipynb says: run `make readme`')
        return
    README.write_text(text, encoding='utf-8')
    print(f'README.md: {len(text.splitlines())} lines')

if __name__ == '__main__': main(sys.argv[1:])
