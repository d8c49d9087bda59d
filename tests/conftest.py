"""Settings for all tests."""

from hypothesis import HealthCheck, settings

# The machine may be busy: a slow example is no fault.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
