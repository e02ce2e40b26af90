"""The command line: one file to a command, and what they share.

`recipes` turns options into a trainer, `runs` opens and reads directories of runs, and
`sample_folder` fills one with samples. The top floor: it imports every wing, and none imports it.
"""

from fastcm.cli.app import main as main
