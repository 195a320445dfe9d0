"""Latency sources: a request's latency on a device, stage by stage, in milliseconds."""

from envs.latency.clock import AnyClock, Clock, MeasuringClock, is_measuring, reference_shape
from envs.latency.latency_profile import Identity, LatencyProfile
from envs.latency.measured import MeasuredClock
from envs.latency.profiled import ProfiledClock
from envs.latency.profiler import profile
from envs.latency.record import STAGES, LatencyRecord, RequestShape
from envs.latency.roofline import DEVICES, RooflineClock

__all__ = [
    "DEVICES",
    "STAGES",
    "AnyClock",
    "Clock",
    "Identity",
    "LatencyProfile",
    "LatencyRecord",
    "MeasuredClock",
    "MeasuringClock",
    "ProfiledClock",
    "RequestShape",
    "RooflineClock",
    "is_measuring",
    "profile",
    "reference_shape",
]
