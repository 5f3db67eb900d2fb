"""python -m mgrpo"""

from mgrpo.cli import main

main()
