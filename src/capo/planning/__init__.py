"""What CAPO would add to a training job, in memory and in time, before it is started."""
