"""`python -m diffsmooth` is the command `diffsmooth`."""

from diffsmooth.jobs.start import main

main()
