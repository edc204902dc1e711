"""Six linear teachers, three of which need experts of their own: a reconstruction of iGSP (arXiv 2605.19301).

    subspace-jax train --config continual/igsp_teacher --workdir work/igsp_teacher

Experts of rank 2 beside a 32 x 16 kernel of zeros, two candidates a task, 400 + 400 steps of Adam a task: a
minute of processor time.  To reach: errors of at most 0.03, no expert added by tasks 2, 3 and 5, some by 0, 1 and 4.
"""

from subspace_jax.continual.igsp import teacher


def get_config():
    return teacher.default_config()
