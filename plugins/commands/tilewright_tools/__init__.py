"""Commands around the engine: plugins, doctor, bench, convert and verify."""
