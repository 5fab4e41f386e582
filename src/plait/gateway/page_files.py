"""The web page at `/`: the files of the folder `page` beside this module, read once, served as they are."""

import mimetypes
from pathlib import Path

from fastapi import APIRouter, Response

PAGE_FOLDER = Path(__file__).parent / "page"

# Nothing from elsewhere, and in nobody's frame: the page handles API keys.
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'self'; style-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_paths(folder: Path) -> dict[str, Path]:
    """URL path of each file of the page; `index.html` is `/`."""
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {_url_path(path.relative_to(folder).as_posix()): path for path in files}


def page_router(folder: Path) -> APIRouter:
    """Routes for every file of the page, and an empty icon if it has none."""
    router = APIRouter(include_in_schema=False)
    paths = page_paths(folder)
    for url_path, path in paths.items():
        router.add_api_route(url_path, _serve(path), methods=["GET", "HEAD"])
    if "/favicon.ico" not in paths:
        router.add_api_route("/favicon.ico", _no_icon, methods=["GET", "HEAD"])
    return router


def _url_path(relative: str) -> str:
    return "/" if relative == "index.html" else f"/{relative}"


def _serve(path: Path):
    content = path.read_bytes()
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"

    async def serve() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return serve


async def _no_icon() -> Response:
    return Response(status_code=204)
