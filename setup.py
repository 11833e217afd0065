"Hands settings.ini over to setuptools; what to change is there."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

cp = ConfigParser(delimiters=['='])
cp.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = cp['DEFAULT']
lib, extra = cfg['lib_name'], '_requirements'

setup(
    name=lib, version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Natural Language :: English', 'Programming Language :: Python :: 3'],
    packages=find_packages(include=[lib, f'{lib}.*']), zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix(extra): v.split() for k,v in cfg.items() if k.endswith(extra)},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{lib}={lib}._modidx:d']),
)
