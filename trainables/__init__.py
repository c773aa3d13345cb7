"""Ray's side: each trial as a Ray Train run, races and sweeps as Ray Tune experiments. Holds no algorithm.

Ray reads these settings when it is first imported, so they are made here, before any module of this package imports it.
"""

import os

SETTINGS = {
    # Said explicitly: a local session writes a token for its user, the workers of a cluster must have it.
    "RAY_AUTH_MODE": "token",
    # A local session listens on 127.0.0.1 alone. (The name speaks of other systems; it decides this on all of them.)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A report costs up to one health-check interval; the default of 2 s would show in every trial.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The newer output of Tune names its own folder whatever `verbose` says; the older one is silent.
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A sweep hands out as many trials as may run side by side; Tune would let one at a time wait for its machine.
    "TUNE_MAX_PENDING_TRIALS_PG": "200",
    # Reports between validations carry no val/loss; the scheduler waits for one that does.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
