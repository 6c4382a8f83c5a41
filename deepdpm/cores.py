"""The processor cores that this process may use."""

import joblib
import torch


def use_granted_cores() -> None:
    """Let torch compute with no more threads than there are cores for this process.

    torch counts the machine's cores. Where a container or a batch system grants fewer by a quota, threads
    that wait for each other would take their time from those that compute. A smaller number of threads, set
    by the user, stays.

    >>> use_granted_cores()
    >>> 1 <= torch.get_num_threads() <= joblib.cpu_count()
    True
    """
    torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))
