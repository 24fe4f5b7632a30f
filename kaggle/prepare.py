"""Fill build/ with what Kaggle is sent: `python kaggle/prepare.py NAME`, NAME being your Kaggle user name.

build/wheel   the wheel of this checkout, to be uploaded as a private dataset
build/kernel  the script that installs that wheel and trains
"""
from pathlib import Path
import shutil, subprocess, sys

here = Path(__file__).resolve().parent

def fill(name: str, user: str, folder: Path):
    "Copy a metadata file with the user's name in the place of the placeholder"
    text = (here/name).read_text(encoding='utf-8')
    (folder/name).write_text(text.replace('YOUR_KAGGLE_USERNAME', user), encoding='utf-8')

def main(user: str):
    shutil.rmtree(here/'build', ignore_errors=True)
    wheel, kernel = here/'build/wheel', here/'build/kernel'
    for folder in (wheel, kernel): folder.mkdir(parents=True)
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', wheel, here.parent], check=True)
    fill('dataset-metadata.json', user, wheel)
    fill('kernel-metadata.json', user, kernel)
    shutil.copy2(here/'train.py', kernel)

if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(sys.argv[1])
