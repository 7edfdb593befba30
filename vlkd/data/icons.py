"""Named pictograms from the icon fonts inside the `qtawesome` wheel (extra `[demo]`), read without importing Qt.

Only the fonts' files and their name tables are read; nothing of them is copied into vlkd. Licences of the fonts used:
Material Design Icons 6.9 (Apache-2.0), Font Awesome 6 free solid and regular (SIL OFL 1.1), Phosphor 1.3 (MIT),
Remix Icon 2.5 (Apache-2.0), Elusive Icons 2.0 (SIL OFL 1.1). Brand fonts are left out, and so are brand names.

A *noun* is a cleaned name ("account-circle-outline" -> "account circle"); its *drawings* are the glyphs of every font,
weight and "-outline" or "-variant" form that share it. Remix and Elusive only add drawings to nouns that another font
has, because their tables mix brands with things.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from vlkd.data.scene_words import COLOURS
from vlkd.errors import UserError

MASTER_SIZE = 96
"""Pixels per em of a cached glyph mask."""


@dataclass(frozen=True, kw_only=True)
class _Font:
    """A font by the stem of its files, how its names end, and whether it adds nouns of its own."""

    stem: str
    endings: tuple[str, ...] = ()
    """Last words that mark another drawing of the same noun."""
    skipped_endings: tuple[str, ...] = ()
    """Last words of drawings too faint to read at 64 pixels."""
    adds_nouns: bool = True


@dataclass(frozen=True, order=True)
class Drawing:
    """One glyph: the font's file and the code point in it."""

    font: str
    codepoint: int


_FONTS = (
    _Font(stem="materialdesignicons6-webfont", endings=("outline", "variant")),
    _Font(stem="fontawesome6-solid-webfont"),
    _Font(stem="fontawesome6-regular-webfont"),
    _Font(stem="phosphor", endings=("fill", "bold"), skipped_endings=("thin", "light")),
    _Font(stem="remixicon", endings=("fill", "line"), adds_nouns=False),
    _Font(stem="elusiveicons-webfont", endings=("alt",), adds_nouns=False),
)

# Signs, typography, editors and diagrams; struck-out and partial forms; directions, which a caption would confuse with
# its own layout.
_MARKS = """
ab abjad align alpha alphabet alphabetical ampersand and angle angles api arrow arrows ascending asterisk axis badge
bold border bottom braces brackets branch by caret center chevron code collapse column commit content css currency
cursor debug decimal default descending disabled down eight empty enabled end equal equals expand exponent five font
format four fraction from full function general gesture git greater half hashtag hdr heading hexadecimal high
horizontal html in indent infinity inset intermediate italic json lambda language led left less letter light low lower
many math medium merge middle minus misc nine non none normal notdef null number numeric of off omega on one or order
other outdent overscan page paragraph pi plus pos processing pull raw refresh regex relation remove resize right roman
rotate row scribble select selection set seven sigma sign simple six slash sort source sql start strength
strikethrough subdirectory subscript superscript svg sync table ten text the thin three tilde to top transfer two
underline unicode up upper variable vector vertical view webhook xml zero zodiac
"""
_BRANDS = """
adobe airbnb alexa amazon android angular angularjs ansible apache apple arch artstation atlassian awesome aws azure
babel behance bitbucket bitcoin bluetooth bootstrap bulma centos chrome codepen cordova cryengine csv debian dev
deviantart devto digg discord disney disqus dns docker dolby dribbble dropbox drupal ebay edge emby eslint ethereum
etsy evernote excel facebook fedora figma firebase firefox foursquare framer freebsd gatsby gentoo gif github gitlab
gmail gnome gog golang goodreads google graphql haskell hdmi hololens huawei hubspot hulu ikea instagram iobroker ip
ipod jabber java javascript jedi jenkins jira joomla jpg jquery jsfiddle kafka khanda kickstarter klingon kodi kotlin
kubernetes laravel lastfm lastpass linkedin linux litecoin logo lte lumx manjaro mapbox mastercard mastodon md
messenger microsoft middleware minecraft mp nas nativescript netflix nfc nintendo nix nodejs nokia notion npm nuxt
nvidia oci ocr odnoklassniki onedrive onepassword openid opera oracle origin outlook pandora patreon paypal pdf php
pinterest playstation plex png pokeball pokemon powerpoint powershell python qqchat quora react reddit redhat roku
rollupjs rss ruby rust safari salesforce samsung sass sd sharepoint signal sketch skydrive skype slack snapchat sony
soundcloud spotify ssh stackoverflow stackpath steam stripe swift symfony tailwind teamviewer telegram terraform tesla
tiktok toslink trello triforce tty tumblr twitch twitter uber ubisoft ubuntu umbraco unity unreal usb vimeo visa vlc
vpn vuejs vuetify waze webpack webrtc wechat whatsapp wikipedia windows word wordpress xamarin xbox xmark xmpp yahoo
youtube zend zhihu zigbee
"""
_DROPPED_WORDS = frozenset(_MARKS.split() + _BRANDS.split())
_DROPPED_PREFIXES = ("food", "fruit", "weather")


def font_folder() -> Path:
    """The folder with the fonts of the installed `qtawesome`; raises `UserError` when it is not installed."""
    spec = importlib.util.find_spec("qtawesome")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or not (Path(folders[0]) / "fonts").is_dir():
        raise UserError(
            "The icon scenes draw the fonts of the package qtawesome, which is not installed; "
            'run `pip install "vlkd[demo]"`, or use the scenes of kind "shapes", which need nothing.'
        )
    return Path(folders[0]) / "fonts"


def noun_of(name: str, endings: tuple[str, ...] = ()) -> str | None:
    """The noun of an icon name, or None for a sign, a brand, a numbered or struck-out form, or a colour's name.

    Args:
        name: as in the font's table, words joined by hyphens.
        endings: last words that mark another drawing of the same noun.
    """
    words = name.split("-")
    while len(words) > 1 and words[-1] in endings:
        words.pop()
    if len(words) > 1 and words[0] in _DROPPED_PREFIXES:
        words = words[1:]
    if len(words) > 3 or any(word in _DROPPED_WORDS or word in COLOURS for word in words):
        return None
    if len("".join(words)) < 3 or not all(re.fullmatch(r"[a-z]{2,}", word) for word in words):
        return None
    return " ".join(words)


@functools.cache
def catalogue() -> Mapping[str, tuple[Drawing, ...]]:
    """Every noun with its drawings, the most common first: those in most fonts, then fewer words, then the alphabet.

    Raises:
        UserError: when `qtawesome` is not installed or holds none of the expected fonts.
    """
    folder = font_folder()
    found: dict[str, set[Drawing]] = defaultdict(set)
    for font in _FONTS:
        for table in sorted(folder.glob(f"{font.stem}-charmap-*.json")):
            file = table.name.replace("-charmap-", "-").replace(".json", ".ttf")
            for name, codepoint in json.loads(table.read_text(encoding="utf-8")).items():
                noun = None if name.endswith(font.skipped_endings or " ") else noun_of(name, font.endings)
                if noun and (font.adds_nouns or noun in found):
                    found[noun].add(Drawing(file, int(codepoint, 16)))
    if not found:
        raise UserError(f"{folder} holds none of the icon fonts; expected those of qtawesome 1.4, so install it anew.")
    order = sorted(found, key=lambda noun: (-len({drawing.font for drawing in found[noun]}), noun.count(" "), noun))
    return {noun: tuple(sorted(found[noun])) for noun in order}


def icon_mask(noun: str, rng: Random) -> Image.Image:
    """One of the noun's drawings as a tight mask (mode L, 255 inside), about `MASTER_SIZE` pixels."""
    return _glyph(rng.choice(catalogue()[noun]))


@functools.lru_cache(maxsize=16384)
def _glyph(drawing: Drawing) -> Image.Image:
    font = _font(drawing.font)
    left, top, right, bottom = font.getbbox(chr(drawing.codepoint))
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), chr(drawing.codepoint), fill=255, font=font)
    return mask.crop(mask.getbbox())


@functools.cache
def _font(file: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_folder() / file, MASTER_SIZE, layout_engine=ImageFont.Layout.BASIC)
