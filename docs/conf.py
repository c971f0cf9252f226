"Sphinx's settings"
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))
import reference

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here.parent/'settings.ini', encoding='utf-8')
project = ini['DEFAULT']['name']
author = copyright = ini['DEFAULT']['author']
release = ini['DEFAULT']['version']

extensions = ['myst_nb','sphinx_copybutton','ext']
root_doc = 'index'
exclude_patterns = ['downloads']
api_names = reference.api_names()
repository = ini['DEFAULT'].get('url', '')

myst_enable_extensions = ['dollarmath','colon_fence']
myst_heading_anchors = 3
nb_execution_mode = 'off' # nbdev-test has run them, and their outputs are kept
nb_render_markdown_format = 'myst' # tables in outputs
nb_merge_streams = True
nb_ipywidgets_js = {} # no page needs a script from elsewhere
nb_code_prompt_show = 'Source'
nb_code_prompt_hide = 'Source'
html_math_renderer = 'mathml'

html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = ['static']
html_css_files = ['site.css']
html_search_scorer = str(here/'scorer.js')
html_favicon = 'static/icon.svg'
html_copy_source = html_show_sourcelink = False
html_show_sphinx = html_use_index = False
pygments_style,pygments_dark_style = 'a11y-high-contrast-light','github-dark'
copybutton_exclude = '.linenos, .gp, .go'
