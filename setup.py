"Gives setuptools what `settings.ini` says; `pyproject.toml` lists these fields as dynamic."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(
    version = cfg['version'],
    description = cfg['description'],
    long_description = (here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type = 'text/markdown',
    author = cfg['author'],
    license_expression = cfg['license'],
    keywords = cfg['keywords'].split(),
    url = cfg['url'],
    python_requires = cfg['python'],
    install_requires = cfg['requirements'].split(),
    extras_require = {k: cfg[f'{k}_requirements'].split() for k in ('dev', 'bench')},
    entry_points = {'console_scripts': cfg['console_scripts'].split()})
