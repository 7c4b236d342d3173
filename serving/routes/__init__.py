"""The routes, one file a subject. Each has `router(server) -> APIRouter`."""
