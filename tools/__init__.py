"""Programs around training: preflight, plan, benchmarks, pictures, data."""
