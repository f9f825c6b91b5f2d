"""A device's places, and the seconds in which nobody wanted one."""

import threading
import time

from farm.cores import Cores


def test_a_device_is_idle_while_nobody_has_any_of_it():
    now = [100.0]
    cores = Cores(2, clock=lambda: now[0])
    now[0] = 103.0
    assert cores.idle_s() == 3
    assert cores.take(1, timeout=0)
    now[0] = 110.0
    assert cores.take_when(lambda: 1) == 1
    cores.give_back(1)
    now[0] = 120.0
    assert cores.idle_s() == 3
    cores.give_back(1)
    now[0] = 121.5
    assert cores.idle_s() == 4.5
    assert cores.take(2, timeout=0)
    assert not cores.take(1, timeout=0)
    now[0] = 130.0
    assert cores.idle_s() == 4.5


def test_the_time_that_shards_wait_for_a_place_is_told_however_often_they_ask():
    now = [100.0]
    cores = Cores(1, clock=lambda: now[0])
    assert cores.take(1, timeout=0)
    assert cores.wanted_s() == 0
    for _ in range(2):
        asking = threading.Thread(target=lambda: cores.take(1, timeout=0.05))
        asking.start()
        while not cores.wanted:
            time.sleep(0.001)
        now[0] += 3
        asking.join()
        now[0] += 10
    assert cores.wanted_s() == 6
