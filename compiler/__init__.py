"""The compiler: programs, patterns, passes, verification."""
