"""The files of this checkout: list them, copy them, see whether a command changed them.

As a command, `python tests/checkout.py COMMAND ARG...` runs COMMAND and fails if it fails or if it changed, left or deleted a file.
"""
import os, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ('.git', '__pycache__', '.pytest_cache', '.ipynb_checkpoints', 'build', 'dist')  # folders that tools keep for themselves

def _skip(name):
    "Is this folder a tool's own (caches, environments, build folders)?"
    return name in OWN or name.startswith('.venv') or name.endswith('.egg-info')

def walk(root=ROOT):
    "Every file below `root` outside the folders that tools keep for themselves, sorted."
    out = []
    for folder, subs, names in os.walk(root):
        subs[:] = [o for o in subs if not _skip(o)]
        out += [Path(folder)/o for o in names]
    return sorted(out)

def git(*args, cwd=ROOT):
    "Lines that a git command prints, or None where there is no git or no repository."
    try: r = subprocess.run(['git', '-c', f'safe.directory={cwd}', *args], cwd=cwd, capture_output=True, text=True, encoding='utf-8')
    except FileNotFoundError: return None
    return r.stdout.split('\0') if r.returncode == 0 and (Path(cwd)/'.git').exists() else None

def tracked():
    "Files that git tracks; None where there is no git."
    out = git('ls-files', '-z')
    return out if out is None else [ROOT/o for o in out if o and (ROOT/o).exists()]

def sources():
    "The files that a clone of this checkout would have (tracked, or new and not ignored); without git, all of them."
    out = git('ls-files', '-z', '-co', '--exclude-standard')
    return walk() if out is None else [ROOT/o for o in sorted(set(out)) if o and (ROOT/o).exists()]

def copy_to(dst):
    "Copy `sources()` to the folder `dst`; returns it."
    for src in sources():
        to = Path(dst)/src.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src, to)
    return Path(dst)

def snapshot(root=ROOT):
    "{file: (size, time of the last change)} of every file of `walk(root)`."
    return {str(o.relative_to(root)): (o.stat().st_size, o.stat().st_mtime_ns) for o in walk(root)}

def changes(before, after):
    "Sentences on what differs between two snapshots."
    return ([f'left behind: {o}' for o in sorted(after.keys() - before.keys())] + [f'deleted: {o}' for o in sorted(before.keys() - after.keys())]
        + [f'changed: {o}' for o in sorted(before.keys() & after.keys()) if before[o] != after[o]])

def main(cmd):
    before = snapshot()
    status = subprocess.run(cmd, cwd=ROOT).returncode
    found = changes(before, snapshot())
    for o in found: print(f'{Path(cmd[0]).name} {o}', file=sys.stderr)
    return status or bool(found)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
