"Make the picture of a report that the README shows: train on digits, fold, open the report in Chromium"
import sys, tempfile
from pathlib import Path
from fastai.vision.all import *
from sklearn.datasets import load_digits
from fasterfold.all import *

docs = Path(__file__).parent
sys.path.insert(0, str(docs.parent/'tests'))
from browser import chromium

def digits_learner(path:Path)->Learner:
    "A trained ResNet-18 on images of digits."
    digits = load_digits()
    for i,(img,label) in enumerate(zip(digits.images[:1000], digits.target)):
        (path/str(label)).mkdir(exist_ok=True)
        PILImage.create((img*15).astype('uint8')).save(path/str(label)/f'{i}.png')
    set_seed(42)
    dls = ImageDataLoaders.from_folder(path, valid_pct=.2, seed=42, item_tfms=Resize(32), bs=32, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(): learn.fit_one_cycle(2, 3e-3)
    return learn

def shoot(
    page, # A browser
    url:str, # Address of a saved report
    path:Path, # File to write
):
    "Save the upper part of a report, up to where the plots begin."
    page.size(1040, 800)
    page.open(url)
    page.ask("document.body.style.margin = '1rem auto'; document.querySelectorAll('h1, body > svg, details').forEach(o => o.remove())")
    path.parent.mkdir(exist_ok=True)
    page.picture(path, whole=True)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d:
        digits_learner(Path(d)).fold().save(Path(d)/'report.html')
        with chromium() as page: shoot(page, f'file://{d}/report.html', docs/'images'/'report.png')
