"""What the curvature costs on a GPU: checks, ceilings, the core and whole update steps."""
