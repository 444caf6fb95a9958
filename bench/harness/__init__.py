"""What every case measures with: the machine and its roof, timers, memory, counting, contenders and their turns."""
