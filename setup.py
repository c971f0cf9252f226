"Hands setuptools the metadata of `settings.ini`, the fields that `pyproject.toml` lists as dynamic, and has it put stubs into the wheel."
import re, sys
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
sys.path.insert(0, str(here))
import stubs

class BuildWithStubs(build_py):
    "Copies the package and writes its stubs"
    def run(self):
        super().run()
        if not self.editable_mode: stubs.write(here/'fasterfold', Path(self.build_lib)/'fasterfold')

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

# A package index shows the README alone, so its links must say where the rest is
readme = (here/'README.md').read_text(encoding='utf-8')
for kind,pre in (('raw', r'!\[[^]]*\]\('), ('blob', r'(?<!!)\[[^]]*\]\(')):
    readme = re.sub(fr"({pre})(?![a-z]+:|#)", fr"\g<1>{cfg['url']}/{kind}/main/", readme)

setup(cmdclass=dict(build_py=BuildWithStubs), version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(), author=cfg['author'],
    long_description=readme, long_description_content_type='text/markdown',
    license_expression=cfg['license'], project_urls={'Repository': cfg['url']},
    classifiers=cfg['classifiers'].strip().splitlines(), python_requires=cfg['python'],
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('test', 'dev', 'bench', 'onnx')},
    entry_points={'console_scripts': cfg['scripts'].split()})
