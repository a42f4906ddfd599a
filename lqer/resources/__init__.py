"""What a run needs in memory and on disk, what the machine has, and the refusal of a run that cannot fit."""
