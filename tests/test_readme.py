"README.md is what nbs/index.ipynb says, its links lead somewhere and its commands exist."
import re, shlex, subprocess, sys

import nbformat
import pytest

from checkout import ROOT
import readme

needs_index = pytest.mark.skipif(not readme.INDEX.exists(), reason='no nbs/index.ipynb yet')

def book(tmp_path, *cells):
    "A notebook of (kind, source, outputs) cells, written to a file."
    nb = nbformat.v4.new_notebook()
    for kind, source, *outputs in cells:
        nb.cells.append(nbformat.v4.new_markdown_cell(source) if kind == 'md' else nbformat.v4.new_code_cell(source, outputs=list(outputs)))
    path = tmp_path/'index.ipynb'
    nbformat.write(nb, path)
    return path

def out(**data): return nbformat.v4.new_output('execute_result', {k.replace('_', '/'): v for k, v in data.items()})

def test_links_move_to_the_top(tmp_path):
    text = readme.render(book(tmp_path, ('md', '# T\n\n![main](../reports/first/a.png) [core](00_core.ipynb#Seeds) [web](https://x.org/../a) [here](#t)\n<img src="../reports/b.svg">\n`[c](../d)`\n\n~~~md\n[e](../f)\n~~~')))
    for o in ('](reports/first/a.png)', '](nbs/00_core.ipynb#Seeds)', '](https://x.org/../a)', '](#t)', 'src="reports/b.svg"', '`[c](../d)`', '[e](../f)'): assert o in text

def test_directives_and_hidden_cells_go(tmp_path):
    stream = nbformat.v4.new_output('stream', name='stdout', text='seen\n')
    text = readme.render(book(tmp_path, ('code', '#| hide\nsecret = 1'), ('code', '#| echo: false\nmade()', stream), ('code', '#| eval: false\nshown()'),
        ('code', '#| output: false\nquiet()', nbformat.v4.new_output('stream', name='stdout', text='unseen\n'))))
    assert '#|' not in text and 'secret' not in text and 'made()' not in text and 'unseen' not in text
    assert 'seen' in text and '```python\nshown()\n```' in text and 'quiet()' in text and '```python\n```' not in text

def test_tables_keep_no_style(tmp_path):
    text = readme.render(book(tmp_path, ('code', 'df', out(text_html='<style>x{}</style><table><tr><td>93</td></tr></table>', text_plain='93'))))
    assert '<table>' in text and '<style' not in text
    text = readme.render(book(tmp_path, ('code', 'Markdown(t)', out(text_markdown='| a |\n|---|\n| 1 |', text_plain='<Markdown>'))))
    assert '| a |\n|---|' in text and '<Markdown>' not in text

def test_pictures_and_errors_are_refused(tmp_path):
    with pytest.raises(SystemExit, match='picture'): readme.render(book(tmp_path, ('code', 'plot()', out(image_png='aGk='))))
    err = nbformat.v4.new_output('error', ename='ValueError', evalue='x', traceback=[])
    with pytest.raises(SystemExit, match='failed'): readme.render(book(tmp_path, ('code', 'boom()', err)))

@needs_index
def test_is_up_to_date():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme.render(), 'run `make readme`'

@needs_index
def test_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    text = re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.S | re.M)
    links = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'''\b(?:src|href)=["']([^"']+)''', text)
    for o in links:
        if not re.match(r'[a-z]+:|#', o): assert (ROOT/o.partition('#')[0]).exists(), o

def commands():
    "The `make` and `qisal` commands of README.md's shell blocks and inline code."
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    lines = [l for _, b in re.findall(r'^(```|~~~)(?:bash|sh|shell|console)\n(.*?)^\1', text, re.S | re.M) for l in b.replace('\\\n', ' ').splitlines()]
    found = [c.strip().removeprefix('$ ') for l in lines + re.findall(r'`([^`\n]+)`', text) for c in re.split(r'&&|;', l)]
    return [shlex.split(o, comments=True) for o in found if re.match(r'(make|qisal) [a-z-]', o)]

@needs_index
def test_commands_exist():
    "Every make target, every qisal command and every option that the README names is there."
    targets = set(re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(encoding='utf-8'), re.M))
    found = commands()
    assert ['make', 'study'] in found and ['make', 'test'] in found, 'the two commands are shown'
    helps = {}
    for cmd in found:
        if cmd[0] == 'make':
            assert [o for o in cmd[1:] if '=' not in o][0] in targets, cmd
            continue
        if cmd[1].startswith('-') : continue
        if cmd[1] not in helps:
            r = subprocess.run([sys.executable, '-m', 'qisal.cli', cmd[1], '--help'], cwd=ROOT, capture_output=True, text=True, env={'COLUMNS': '200', 'TERM': 'dumb', 'PATH': '/usr/bin:/bin'}, encoding='utf-8')
            assert r.returncode == 0, f'{cmd}: {r.stderr}'
            helps[cmd[1]] = r.stdout
        for o in cmd[2:]:
            if o.startswith('--'): assert o.partition('=')[0] in helps[cmd[1]], f'{cmd}: no option {o}'
