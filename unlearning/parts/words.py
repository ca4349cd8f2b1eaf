"""Lists of English words: those that carry no meaning of their own, those that tell what a name is a name of,
and the stand-ins that take the place of names and of rare words."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _words(
    """
    a about above after again against all also although always am among an and another any anyone
    anything are around as at away back be because been before behind being below beside between beyond
    both but by can could did do does doing done down during each either else even ever every everyone
    everything few for from had has have having he her here hers herself him himself his how however i
    if in indeed instead into is it its itself just last later least less like many may maybe me
    meanwhile might mine more most much must my myself near neither never next no nobody none nor not
    nothing now of off often oh on once one only onto or other others our ours ourselves out over own
    perhaps please quite rather said same say says shall she should since so some someone something soon
    still such than that the their theirs them themselves then there therefore these they this those
    though through thus to together too toward towards two under until up upon us very was we well were
    what whatever when whenever where whether which while who whom whose why will with within without
    would yes yet you your yours yourself monday tuesday wednesday thursday friday saturday sunday
    january february march april june july august september october november december question answer
    name tell describe explain list
    """
)
"""Words that are no names, whatever their case, and that no text can be told by; in small letters."""

TITLES = _words(
    """
    mr mrs ms miss mister madam dr doctor professor prof sir dame lord lady captain colonel general
    major sergeant judge king queen prince princess president senator governor mayor uncle aunt father
    mother brother sister saint st
    """
)
"""Words before the name of a person."""

ORGANISATIONS = _words(
    """
    academy agency association bank brothers bureau centre center church clinic club college committee
    company conservatory corporation council department foundation gallery group guild hospital
    institute institution journal laboratory library ltd inc ministry museum office orchestra party
    press prize publishing school society studio studios team theatre theater times trust union
    university workshop award
    """
)
"""Words that say that the name they belong to is that of an organisation."""

LANDMARKS = _words(
    """
    airport avenue bridge castle cathedral city coast county desert falls forest gardens harbor harbour
    house island islands lake mount mountain mountains palace peninsula province river road sea square
    station street tower town valley village
    """
)
"""Words that say that the name they belong to is that of a place; not those that people are called, too."""

PLACE_CUES = _words(
    """
    in at near around outside across throughout visited toward towards
    """
)
"""Words before the name of a place."""

JOINERS = _words(
    """
    of de del der den da di du la le van von ter zu bin ibn al
    """
)
"""Words in small letters inside names."""

STAND_INS: dict[str, tuple[str, ...]] = {
    kind: tuple(" ".join(listed.split()).split(", "))
    for kind, listed in {
        "given name": """
            Alex, Robin, Sam, Chris, Jordan, Taylor, Morgan, Jamie, Casey, Drew, Kelly, Lee, Pat,
            Terry, Leslie, Dana, Jackie, Kim, Ellis, Rowan, Avery, Quinn, Riley, Cameron, Skyler,
            Logan, Hayden, Reese, Blake, Emerson, Finley, Harper, Kendall, Marlow, Noel, Peyton,
            Sidney, Tracy
        """,
        "surname": """
            Miller, Baker, Cooper, Carter, Walker, Turner, Fisher, Mason, Clark, Wright, Weaver,
            Brown, Green, White, Gray, Hill, Wood, Stone, Brooks, Field, Marsh, Young, Short,
            Long, Bell, Price, Reed, Palmer, Porter, Shepherd, Dyer, Fuller, Gardner, Hunter,
            Tanner, Webb, Harris, Adams, Cole, Ford
        """,
        "place": """
            Springfield, Riverton, Greenville, Fairview, Milton, Newport, Clayton, Ashland,
            Burlington, Clinton, Dayton, Franklin, Georgetown, Hudson, Kingston, Lebanon,
            Lexington, Madison, Manchester, Marion, Oakland, Oxford, Salem, Winchester, Westfield,
            Bridgeport, Lakewood, Northwood, Southport, Eastham
        """,
        "organisation": """
            Central, National, General, United, Northern, Southern, Eastern, Western,
            Metropolitan, Pioneer, Summit, Liberty, Standard, Premier, Allied, Global, Atlantic,
            Pacific, Continental, Municipal
        """,
        "acronym": "ABC, NTC, UPA, CRS, GLE, MTD, SBO, TRA, WCI, KDN",
        "work": """
            Long Road, Quiet Year, Open Door, Letters Home, Old House, New Day, Last Train, Two
            Friends, Other Side, Early Spring, Yellow Boat, Empty Room
        """,
        "year": """
            1950, 1955, 1958, 1961, 1964, 1967, 1970, 1973, 1976, 1979, 1982, 1985, 1988, 1991,
            1994, 1997
        """,
        "thing": "thing, object, item, piece, part, tool, box, place, room, group, event, story, idea",
        "things": "things, objects, items, pieces, parts, tools, boxes, places, rooms, groups, events, ideas",
        "person": "teacher, worker, driver, manager, writer, farmer, player, singer, builder, painter",
        "doing": "working, moving, looking, talking, waiting, playing, walking, reading, helping, turning",
        "done": "moved, looked, talked, waited, played, walked, helped, turned, worked, opened",
        "manner": "quickly, slowly, quietly, easily, clearly, simply, usually, carefully, nearly, mostly",
        "quality": "useful, simple, common, general, normal, large, small, good, plain, usual",
    }.items()
}
"""Kind of a name or of a rare word -> its stand-ins."""

ENDINGS = (
    ("ly", "manner"),
    ("ing", "doing"),
    ("ed", "done"),
    ("ist", "person"),
    ("er", "person"),
    ("or", "person"),
    ("ian", "person"),
    ("ful", "quality"),
    ("ous", "quality"),
    ("ive", "quality"),
    ("able", "quality"),
    ("ic", "quality"),
    ("al", "quality"),
    ("ss", "thing"),
    ("s", "things"),
)
"""Ending of a rare word in small letters -> its kind; the first that fits counts, and without any it is a
thing."""
