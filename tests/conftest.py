"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# how fast a machine draws inputs says nothing of the code
settings.register_profile("llmopt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmopt")
