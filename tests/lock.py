"""Rewrites constraints.txt: what `settings.ini` asks for, resolved for every Python from `min_python` on. Run by `make lock`.

Pins that are there already are kept where they can be. No index address and no path gets into the file.
"""
import subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = '''# What `make` installs, for every supported Python: made by `make lock` from settings.ini, not by hand.
# It locks the development environment only; `pip install qisal` is free to take the newest of everything.
'''

def settings():
    "The [DEFAULT] section of settings.ini."
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def main():
    s, lock = settings(), ROOT/'constraints.txt'
    wanted = [o for k in s if k == 'requirements' or k == 'dev_requirements' for o in s[k].split()]
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'in').write_text('\n'.join(wanted) + '\n', encoding='utf-8')
        if lock.exists(): (Path(d)/'out').write_text(lock.read_text(encoding='utf-8'), encoding='utf-8')
        subprocess.run([sys.executable, '-m', 'uv', 'pip', 'compile', '--universal', '--python-version', s['min_python'], '--no-header',
            '--no-annotate', '--no-emit-index-url', '--no-emit-find-links', '--quiet', '-o', 'out', 'in'], cwd=d, check=True)
        pins = (Path(d)/'out').read_text(encoding='utf-8')
    lock.write_text(HEAD + pins, encoding='utf-8')
    print(f"constraints.txt: {len(pins.splitlines())} pins")

if __name__ == '__main__': main()
