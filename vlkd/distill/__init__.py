"""Terms, the teachers they match, and the module that turns a batch into named losses."""
