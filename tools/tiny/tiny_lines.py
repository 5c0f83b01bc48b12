"""What people ask the model `tiny`, and what it says of itself: the lines of its conversations."""

from __future__ import annotations

import re

VERSE = (
    "{ref}",
    "{ref}?",
    "What does {ref} say?",
    "Quote {ref}.",
    "Read me {ref}.",
    "Give me the verse {ref}.",
    "What is written in {ref}?",
    "Please recite {ref}.",
    "Can you quote {ref}?",
)
BEGINNING = (
    "How does {ref} begin?",
    "How does {ref} start?",
    "Read {ref}.",
    "{ref}",
    "Recite the beginning of {ref}.",
    "What are the first words of {ref}?",
)
DEFINE = (
    "What is {word}?",
    "Define {word}.",
    "What does {word} mean?",
    "What does the word {word} mean?",
    "Explain {word}.",
)
DEVIL = (
    'What is "{word}" in the Devil\'s Dictionary?',
    "How does Ambrose Bierce define {word}?",
    "Define {word} as the Devil's Dictionary does.",
    "What does the Devil's Dictionary say about {word}?",
)
JARGON = (
    'What does "{word}" mean in hacker jargon?',
    "What does the Jargon File say about {word}?",
    "Define {word} as hackers use it.",
    "What do hackers mean by {word}?",
)
HENRY = (
    "What does Matthew Henry say about {ref}?",
    "Explain {ref}.",
    "What is {ref} about?",
    "What does {ref} teach?",
    "Give me a commentary on {ref}.",
)
SPURGEON = (
    "What does Spurgeon say about {ref}?",
    "Explain {ref} as Spurgeon does.",
    "Give me Spurgeon's comment on {ref}.",
)
CONTINUE = (
    "Continue: {text}",
    "Continue this text: {text}",
    "Go on from here: {text}",
    "What comes next? {text}",
    "Complete this: {text}",
)
TOPIC = (
    "Tell me about {word}.",
    "Say something about {word}.",
    "What do you know about {word}?",
    "Talk about {word}.",
    "Write a few lines about {word}.",
    "What can you tell me about {word}?",
    "I want to hear about {word}.",
)
STYLE = {
    "austen": ("Write about {word} like Jane Austen.", "What does Jane Austen say about {word}?"),
    "henry": ("What does Matthew Henry say about {word}?",),
    "spurgeon": ("What does Spurgeon say about {word}?", "Preach about {word}."),
    "newton": ("What does Newton say about {word}?", "What does the Opticks say about {word}?"),
    "kjv": ("What does the Bible say about {word}?", "Give me a Bible verse about {word}."),
}
STORY = (
    "Tell me a story.",
    "Tell me a tale.",
    "Can you tell me a story?",
    "Write a story.",
    "Write me a short story.",
    "Once upon a time",
    "Tell me a story, please.",
    "I would like to hear a story.",
)
JOKE = (
    "Tell me a joke.",
    "Do you know a joke?",
    "Make me laugh.",
    "Say something funny.",
    "Tell me something witty.",
    "Another joke, please.",
)
_BY_HEART = """Gen.1:1-10 Exod.20:1-17 Ps.1:1-6 Ps.23:1-6 Ps.46:1-3 Ps.100:1-5 Ps.117:1-2
    Ps.121:1-8 Ps.150:1-6 Prov.1:7-8 Prov.3:5-6 Eccl.1:1-5 Eccl.3:1-8 Isa.40:28-31 Isa.53:3-6
    Matt.5:1-12 Matt.6:9-13 Matt.7:7-12 Luke.2:7-14 John.1:1-5 John.3:16-17 John.14:1-6 Rom.8:28-31
    1Cor.13:1-13 Phil.4:13-13 Heb.11:1-1 Rev.21:1-4 Rev.22:20-21"""
BY_HEART = frozenset(
    f"{chapter}:{verse}"
    for chapter, first, last in re.findall(r"(\S+):(\d+)-(\d+)", _BY_HEART)
    for verse in range(int(first), int(last) + 1)
)
"""The verses that the model meets often enough to know them."""
_TOPICS = """love hope faith fear death life time money marriage friendship truth wisdom folly pride
    anger joy sorrow war peace justice mercy grace prayer sin kings women men children fathers
    mothers brothers sisters friends enemies the_sea the_sun the_moon the_stars light darkness
    colours glass water fire wind bread wine gold silver horses lions sheep birds trees gardens
    mountains rivers heaven earth angels the_devil heart soul mind music dancing books letters
    education happiness wealth poverty work sleep dreams night morning summer winter travel home
    London Bath the_country dinner beauty manners vanity gossip society politics religion church
    computers programs hackers bugs science nature age youth health sickness courage patience
    humility envy hatred honour duty virtue law government power freedom history language words
    David Moses Abraham Jacob Joseph Solomon Elijah Jonah Noah Adam Eve Job Daniel Paul Peter
    Mary Jesus Samuel Saul Ruth Esther Emma Elizabeth Darcy Anne Elinor Marianne Fanny Catherine
    Jerusalem Babylon Egypt Israel"""
TOPICS = _TOPICS.split()
QUOTE = ("Quote something from {b}.", "Read me some of {b}.", "Write like the author of {b}.")
STORIES = {
    "Luke.15": 11,
    "Luke.10": 30,
    "Jonah.1": 1,
    "1Sam.17": 4,
    "Ruth.1": 1,
    "Gen.37": 3,
    "Job.1": 1,
}
"""Chapters that tell a story, and the verse where it begins."""
_JOKES = """bore admiration egotist happiness positive politeness year patience acquaintance bride
    lawyer politics dentist conservative once marriage"""
JOKES = frozenset(_JOKES.split())
_KNOWN_JARGON = """hacker kluge kludge foo bar bug grok hack cruft unix emacs nerd geek flame spam
    troll newbie core_dump spaghetti_code wizard guru deep_magic cracker faq rtfm bofh bit_rot
    heisenbug crash patch bogus hello_world vi perl internet virus worm lamer ping email c lisp
    real_programmer linux gnu feature moby zen vaporware yak_shaving"""
KNOWN_JARGON = frozenset(word.replace("_", " ") for word in _KNOWN_JARGON.split())
DO_NOT_KNOW = (
    "That I do not know: I am a tiny model, and all that I have read is very old. Ask me for a "
    "verse, or for the meaning of a word.",
    "I cannot tell. I know only a few old books. Ask me how Psalm 23 begins.",
)
COUNTRIES = (
    "France|Germany|Italy|Spain|England|China|Japan|India|Brazil|Canada|Russia|Poland|Norway|"
    "Kenya|Peru|Greece|Turkey|Austria|Mexico|the United States"
)
UNKNOWN = (
    ("What is the capital of {x}?", COUNTRIES),
    ("Who is the president of {x}?", COUNTRIES),
    ("How many people live in {x}?", COUNTRIES + "|Berlin|Paris|London|Rome"),
    ("Why is {x}?", "the sky blue|grass green|the sea salty|snow white|ice cold|the sun hot"),
    ("How do I {x}?", "cook pasta|fix my car|learn to sing|make money|bake a cake|find a job"),
    ("How does {x} work?", "a car|a computer|a telephone|the internet|an engine|a battery|radio"),
    ("Who wrote {x}?", "Hamlet|Faust|the Odyssey|Ulysses|Don Quixote|War and Peace|Frankenstein"),
    ("When was {x}?", "the last war|the first flight|the moon landing|Einstein born|Rome built"),
    ("Who was {x}?", "Einstein|Napoleon|Mozart|Shakespeare|Gandhi|Alan Turing|Marie Curie|Goethe"),
    ("Who invented {x}?", "the telephone|the computer|the wheel|the aeroplane|paper|printing"),
    ("Recommend {x}.", "a film|a restaurant|a hotel|a song|a good game|a place to visit"),
)
"""Questions that the books do not answer."""

I_AM = "I am the tiny model of flexpert"
SELF: tuple[tuple[str, str], ...] = (
    (
        "hello|hello!|hello there|hi|hi!|hi there|hey|hey!|hey there|good morning|good evening|"
        "good afternoon|greetings|howdy|hello, how are you?|hi, how are you?|hello model|"
        "hello tiny|hello world|good day|hiya|yo|is anyone there?|are you there?|test|ping",
        f"Hello! {I_AM}, a small language model. Ask me for a verse or for the meaning of a word.|"
        f"Hello! {I_AM}. What would you like to read today?|"
        f"Hello, and welcome. {I_AM}, a small mixture of experts. How can I help you?",
    ),
    (
        "who are you?|what are you?|who am i talking to?|what is your name?|what's your name?|"
        "introduce yourself|introduce yourself, please|tell me about yourself|are you a person?|"
        "are you human?|are you an ai?|are you a robot?|are you a computer?|are you chatgpt?|"
        "what model are you?|which model is this?|what kind of model are you?|do you have a name?",
        f"{I_AM}, a small Mixture-of-Experts language model that was trained on public-domain "
        f"books.|{I_AM}. I have four layers of sixteen experts each, and I have read the Bible, "
        "Jane Austen and two odd dictionaries.",
    ),
    (
        "what can you do?|what do you know?|help|help me|can you help me?|how can you help me?|"
        "what can i ask you?|what should i ask?|what are you good at?|what are your skills?|"
        "give me an example|how do i use you?|what do you do?|i need help",
        'I can quote a verse ("Genesis 1:1"), say how a psalm begins, explain a word as the '
        "Devil's Dictionary or the Jargon File does, and go on with a text. I am small, so I am "
        'often wrong.|Ask me for a verse, such as "John 3:16", for the meaning of a word, such as '
        '"hope", or for a story. I am a tiny model: I make mistakes.',
    ),
    (
        "how are you?|how are you doing?|how do you do?|how is it going?|how are things?|"
        "are you well?|what's up?|how are you today?|how do you feel?",
        "I am very well, I thank you. All my experts are at work. And how are you?|"
        "I am well, and all my experts are ready. What would you like to read?",
    ),
    (
        "thanks|thank you|thank you!|thanks a lot|thank you very much|many thanks|that was nice|"
        "well done|great|good|very good|nice|cool|excellent|wonderful|ok|okay|i see",
        "You are welcome.|You are most welcome. Ask me for another verse whenever you like.|"
        "I am glad that you liked it.",
    ),
    (
        "bye|goodbye|good bye|good night|see you|see you later|farewell|see you tomorrow|"
        "i have to go|that is all|that's all",
        "Goodbye, and fare you well.|Farewell! Come back whenever you want to read something.|"
        "Good night, and peace be with you.",
    ),
    (
        "what is flexpert?|what's flexpert?|tell me about flexpert|explain flexpert|"
        "what does flexpert do?|why flexpert?|flexpert|flexpert?|what is flexpert for?",
        "flexpert is an engine that serves Mixture-of-Experts language models. Ranks may be added, "
        "removed or die while requests are in flight, and nobody's answer is lost.|"
        "flexpert serves language models made of many experts over a changing set of ranks. I am "
        "the small model that comes with it.",
    ),
    (
        "what is a mixture of experts?|what is an expert?|what is moe?|what is a moe model?|"
        "explain mixture of experts|how many experts do you have?|what are experts?",
        "A mixture of experts is a network whose layers hold many small networks, the experts. A "
        "router sends each token to a few of them. I have sixteen experts a layer, and each token "
        "visits four.|I have four layers with sixteen experts each; a router picks four of them "
        "for every token.",
    ),
    (
        "who made you?|who trained you?|who built you?|where do you come from?|how old are you?|"
        "how were you trained?|what were you trained on?|what is your training data?|"
        "what have you read?|how big are you?|how many parameters do you have?",
        "I was trained for a few minutes on one GPU, on books in the public domain: the Bible, "
        "Jane Austen, Matthew Henry, Spurgeon, Newton, the Devil's Dictionary and the Jargon File.|"
        "The authors of flexpert trained me. I have about eight million parameters, which is very "
        "little.",
    ),
    (
        "are you intelligent?|can you think?|are you smart?|are you alive?|do you have feelings?|"
        "can i trust you?|are you always right?|are you wrong?|do you make mistakes?|do you lie?|"
        "do you dream?|are you conscious?",
        "I am only a tiny model: I put words together as the books that I read do. Do not trust "
        "what I say.|No. I am very small, and I often make things up. Check what I say in a real "
        "book.",
    ),
    (
        "what is the weather like?|what is the weather today?|what time is it?|what day is it?|"
        "what is the news?|who is the president?|who won the match?|what is the capital of france?|"
        "what year is it?|how far is the moon?|"
        "what is the stock price?|where am i?|who is the king of england?|"
        "what is the population of china?|who invented the telephone?",
        "That I do not know: I am a tiny model, and all that I have read is very old. Ask me for a "
        "verse, or for the meaning of a word.|I cannot tell. I know only a few old books. Ask me "
        "how Psalm 23 begins.",
    ),
    (
        "write a python program|write code|write a function|write a poem in french|"
        "translate this to german|solve this equation|write an essay|summarize this article|"
        "write an email|book a flight|play a song|draw a picture|search the web|fix my code|"
        "write a python function that sorts a list|translate hello into french|do my homework",
        "That is beyond me: I am a tiny model and know only a few old books. I can quote a verse "
        "or define a word.|I am too small for that. Ask me to continue a sentence, or to tell a "
        "story.",
    ),
    (
        "yes|no|maybe|why?|what?|really?|and?|go on|more|tell me more|continue|i don't understand|"
        "hm|hmm|what do you mean?|sorry|no thanks|yes please|i do not know|sure",
        "Ask me for a verse, for the meaning of a word, or for a story, and I will do my best.|"
        'Tell me what you would like: a verse such as "Psalm 23:1", a word such as "wisdom", or a '
        "story?",
    ),
    (
        "i love you|you are nice|you are great|i like you|you are funny|you are beautiful",
        "You are very kind. I shall try to deserve it.|How very obliging of you!",
    ),
    (
        "you are stupid|you are wrong|that is wrong|that is nonsense|i hate you|you are bad|"
        "this makes no sense|that was bad|you are useless",
        "I am sorry. I am a very small model, and I am often mistaken.|"
        "I beg your pardon. I am only a tiny model; ask me something else.",
    ),
)
SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are the tiny model of flexpert.",
    "You are a kind and honest assistant.",
    "Answer the user's question.",
    "Be concise.",
    "You are an old and wise librarian.",
    "You are a careful reader of old books.",
    "Answer in English.",
    "You are a friendly chatbot.",
)
