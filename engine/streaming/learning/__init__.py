"""The learner: fetches, joins, judges, trains, gives out, and stands where its checkpoint says."""
