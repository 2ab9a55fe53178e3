"Packaging: everything is read from settings.ini. The study's templates and the embedded samples travel in the wheel."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ASSETS = {  # folder below qisal/assets: the files that go there
    'templates': lambda: [ROOT/'nbs'/o for o in ('80_benchmark.ipynb', '90_experiment.ipynb', '91_study.ipynb')],
    'samples': lambda: sorted(o for o in (ROOT/'data'/'samples').rglob('*') if o.is_file() and not o.name.startswith('.')),
}

def read_settings():
    "The [DEFAULT] section of settings.ini."
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

class BuildWithAssets(build_py):
    "Copies the assets to `qisal/assets`. An editable install reads them from the checkout."
    def run(self):
        if self.editable_mode: return super().run()
        shutil.rmtree(Path(self.build_lib)/'qisal', ignore_errors=True)  # what an earlier build left
        super().run()
        for folder, files in ASSETS.items():
            home = ROOT/'data'/'samples' if folder == 'samples' else ROOT/'nbs'
            found = files()
            if not found: raise SystemExit(f'nothing to ship as {folder}: {home.name} is empty')
            for src in found:
                dst = Path(self.build_lib)/'qisal'/'assets'/folder/src.relative_to(home)
                dst.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(src, dst)

s = read_settings()
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
minor = int(s['min_python'].split('.')[1])
readme = ROOT/'README.md'

setup(
    name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'].split(),
    author=s['author'], author_email=s['author_email'], url=s['git_url'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else s['description'],
    long_description_content_type='text/markdown',
    python_requires=f">={s['min_python']}",
    install_requires=s['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): s[k].split() for k in s if k.endswith('_requirements')},
    packages=find_packages(include=['qisal', 'qisal.*']),
    cmdclass={'build_py': BuildWithAssets},
    entry_points={'console_scripts': s['console_scripts'].split(), 'nbdev': [f"{s['lib_path']}={s['lib_path']}._modidx:d"]},
    zip_safe=False,
    classifiers=[f'Development Status :: {statuses[int(s["status"]) - 1]}', 'Intended Audience :: Developers',
        'Intended Audience :: Science/Research', f"Natural Language :: {s['language']}", 'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Programming Language :: Python :: 3', *(f'Programming Language :: Python :: 3.{o}' for o in range(minor, 14))],
)
