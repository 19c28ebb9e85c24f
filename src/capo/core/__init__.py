"""The core: curvature, selection and moments. Imports nothing but torch and the standard library."""
