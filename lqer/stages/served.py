"""What every server of processes imports as well: the bars of a process that it forks are of this process alone.

tqdm's own lock holds between processes too, by a semaphore. A process that is ended would leave it, and Python would
tell of that on the terminal, after the last line of the run.
"""

from threading import RLock

from tqdm import tqdm

tqdm.set_lock(RLock())
